"""When one process of a run dies, the others end, too, and say why.

torchrun and srun see to the first themselves. Where Lightning has started the processes (`trainer.devices=2`, no launcher), its
main process ends all when another one dies, but the others would wait for a dead main process until a collective times out,
which takes NCCL ten minutes: they watch it here.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

_LAUNCHER = "VIL_LAUNCHER_PID"  # of the process that starts the others
_INTERVAL = 2.0  # seconds
_ADVICE = (
    "Its own last words tell why; if there are none, it was killed (out of memory, a lost node, or by hand). The same command "
    "with --resume auto goes on from the newest good checkpoint."
)
_SYMPTOMS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl communicator was aborted",
    "remote process exited",
    "socket closed",
    "timed out waiting",
    "watchdog caught collective operation timeout",
)


def watch_launcher() -> None:
    """Call before the trainer starts. Ends this process soon after the one that started it for the same run has died."""
    launcher = os.environ.get(_LAUNCHER)
    if "LOCAL_RANK" in os.environ and launcher == str(os.getppid()):
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True, name="launcher-watch").start()
    else:
        os.environ[_LAUNCHER] = str(os.getpid())  # for the processes that Lightning starts from here


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_INTERVAL)
    print(
        f"\nerror: process {os.environ.get('LOCAL_RANK')} ends, because the main process of this run (rank 0, PID {launcher}) "
        f"has died. {_ADVICE}",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(_INTERVAL)  # an error of a collective may be on its way, which tells more
    os.kill(os.getpid(), signal.SIGKILL)  # nothing gentler ends a process that hangs in a collective


def lost_peer(error: BaseException, trainer: Any) -> str | None:
    """What to tell if an error comes from a process of the run that is no more; None if it does not."""
    if trainer is None or trainer.world_size < 2 or not any(text in str(error).lower() for text in _SYMPTOMS):
        return None
    dead = _first_dead(getattr(getattr(trainer.strategy, "launcher", None), "procs", None) or [])
    return f"process {trainer.global_rank} has lost another process of this run ({trainer.world_size} in all).{dead} {_ADVICE}"


def _first_dead(processes: list[Any]) -> str:
    """Which of the processes that Lightning has started from here died, and how; "" if none did."""
    # The system may take a moment to note it. But no longer: Lightning, too, looks for it, every five seconds, and then kills
    # this process, with a line of its own that knows of no rank and of no way to go on.
    until = time.monotonic() + 1.0
    while processes:
        for rank, process in enumerate(processes, start=1):
            if code := process.poll():
                how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
                return f" Process {rank} (PID {process.pid}) ended with {how}."
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return ""
