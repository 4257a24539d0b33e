"""Processes for tests of several: forked from one that has imported the large packages, which takes 8 s of CPU time each time.

The children are processes of their own as a cluster starts them: environment, exit code, error output and an ordinary end of
the interpreter. One server (this file, run as a script) works for a whole run of pytest.
"""

import atexit
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_server: subprocess.Popen[str] | None = None


def run(script: Path, environments: list[dict[str, str]], timeout: float) -> list[tuple[int, str]]:
    """Run a Python file once in each environment, side by side.

    Returns:
        Exit code (negative: number of the signal) and error output of each.

    Raises:
        subprocess.TimeoutExpired: They have been killed.
    """
    outputs = [script.with_name(f"{script.stem}_stderr{rank}") for rank in range(len(environments))]
    server = _start()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {"script": str(script), "environments": environments, "errors": [str(p) for p in outputs]}
    server.stdin.write(json.dumps({**request, "timeout": timeout}) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    errors = [path.read_text() for path in outputs]
    if answer["late"]:
        raise subprocess.TimeoutExpired(str(script), timeout, stderr="\n".join(errors))
    return list(zip(answer["codes"], errors, strict=True))


def _start() -> "subprocess.Popen[str]":
    global _server
    if _server is None or _server.poll() is not None:
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(root),
        }  # no threads that a fork would lose
        command = [sys.executable, __file__]
        _server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_server.kill)
    return _server


def _serve() -> dict[str, Any] | None:
    """Answer requests; returns in each child, with what it is to do, and when there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        children: list[int] = []
        for environment, errors in zip(request["environments"], request["errors"], strict=True):
            child = os.fork()
            if child == 0:
                return {"script": request["script"], "environment": environment, "errors": errors}
            children.append(child)
        codes, late = _wait(children, request["timeout"])
        os.write(1, (json.dumps({"codes": codes, "late": late}) + "\n").encode())
    return None


def _wait(children: list[int], timeout: float) -> tuple[list[int], bool]:
    end, codes = time.monotonic() + timeout, dict[int, int]()
    late = False
    while len(codes) < len(children):
        if time.monotonic() > end and not late:
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


def _become(environment: dict[str, str], errors: str) -> None:
    """What differs between a fork and a process that was started anew."""
    import numpy
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    os.environ.clear()
    os.environ.update(environment)
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
    rank_zero_only.rank = int(environment.get("RANK", 0))  # read from the environment when lightning is imported


if __name__ == "__main__":
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401

    import vil_lightning.cli  # noqa: F401

    task = _serve()
    if task is not None:
        import runpy

        _become(task["environment"], task["errors"])
        sys.argv = [task["script"]]
        sys.path[0] = str(Path(task["script"]).parent)
        runpy.run_path(task["script"], run_name="__main__")
