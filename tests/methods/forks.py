"""Processes for tests of several: forked from one that has imported the large packages, which takes 8 s of CPU time each time.

The children have environments, working directory, exit codes, error output and an ordinary end of the interpreter of their own.
What they share with each other, and processes of a cluster do not, is the seed of Python's hashes: the order of sets. Tests for
which that may matter start theirs anew. One server (this file, run as a script) works for a whole run of pytest.
"""

import atexit
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_server: subprocess.Popen[str] | None = None


def run(script: Path, environments: list[dict[str, str]], timeout: float, anew: bool = False) -> list[tuple[int, str]]:
    """Run a Python file once in each environment, side by side. Whatever happens, none of the processes is left behind.

    Args:
        timeout: Seconds for all of them.
        anew: Start new interpreters. That is also done where forks are no good: beside CUDA, and on other systems than Linux.

    Returns:
        Exit code (negative: number of the signal) and error output of each.

    Raises:
        subprocess.TimeoutExpired: They have been killed.
    """
    if anew or sys.platform != "linux" or torch.cuda.is_available():
        return _run_anew(script, environments, timeout)
    outputs = [script.with_name(f"{script.stem}_stderr{rank}") for rank in range(len(environments))]
    for path in outputs:
        path.write_text("")
    request = {"script": str(script), "cwd": os.getcwd(), "environments": environments, "timeout": timeout}
    server = _start()
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(json.dumps({**request, "errors": [str(path) for path in outputs]}) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of forks ended with exit code {server.wait()}")
        answer = json.loads(line)
    except BaseException:  # an interrupted test, too: the next one must not read this one's answer
        _stop()
        raise
    errors = [path.read_text() for path in outputs]
    if answer["late"]:
        raise subprocess.TimeoutExpired(str(script), timeout, stderr="\n".join(errors))
    return list(zip(answer["codes"], errors, strict=True))


def _run_anew(script: Path, environments: list[dict[str, str]], timeout: float) -> list[tuple[int, str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for env in environments
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def _start() -> "subprocess.Popen[str]":
    global _server
    if _server is None or _server.poll() is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # threads would be lost by a fork
        _server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that its children end with it, see `_stop`
        )
        atexit.register(_stop)
    return _server


def _stop() -> None:
    """End the server and all its children."""
    global _server
    if _server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(_server.pid, signal.SIGKILL)
        _server.wait()
        _server = None


# --- the server -------------------------------------------------------------------------------------------------------


def _serve() -> dict[str, Any] | None:
    """Answer requests; returns in each child, with what it is to do, and when there are no more."""
    parent = os.getppid()
    for line in sys.stdin:
        request = json.loads(line)
        children: list[int] = []
        for environment, errors in zip(request["environments"], request["errors"], strict=True):
            child = os.fork()
            if child == 0:
                return {**request, "environment": environment, "errors": errors}
            children.append(child)
        codes, late = _wait(children, request["timeout"], parent)
        os.write(1, (json.dumps({"codes": codes, "late": late}) + "\n").encode())
    return None


def _wait(children: list[int], timeout: float, parent: int) -> tuple[list[int], bool]:
    end, codes = time.monotonic() + timeout, dict[int, int]()
    late = False
    while len(codes) < len(children):
        if not late and (time.monotonic() > end or os.getppid() != parent):
            late = True
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children], late


def _become(environment: dict[str, str], cwd: str, errors: str) -> None:
    """What else differs between a fork and a process that was started anew."""
    import numpy
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, os.devnull, os.O_WRONLY),
        (2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    random.seed()
    numpy.random.seed()
    torch.seed()
    rank_zero_only.rank = int(environment.get("RANK", 0))  # read from the environment when lightning is imported


if __name__ == "__main__":
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401

    import vil_lightning.cli  # noqa: F401

    task = _serve()
    if task is not None:
        import runpy

        _become(task["environment"], task["cwd"], task["errors"])
        sys.argv = [task["script"]]
        sys.path[0] = str(Path(task["script"]).parent)
        runpy.run_path(task["script"], run_name="__main__")
