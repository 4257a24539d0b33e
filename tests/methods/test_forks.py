"""The processes that other tests run in: exit codes, output, limits of time, and nothing left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

import forks
import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
print("output of", os.environ["RANK"], os.getcwd(), file=sys.stderr)
Path(os.environ["OUT"]).write_text(str(os.getpid()))
exec(os.environ["DO"])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "main.py"
    path.write_text(SCRIPT)
    return path


def environments(folder: Path, *what: str) -> list[dict[str, str]]:
    own = [{"RANK": str(i), "DO": do, "OUT": str(folder / f"pid{i}")} for i, do in enumerate(what)]
    return [{**os.environ, **variables} for variables in own]


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or ") Z " in stat.read_text()


@pytest.mark.parametrize("anew", [False, True])
def test_run__exit_codes_and_error_output(script: Path, anew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    what = environments(script.parent, "", "sys.exit(3)", "raise ValueError('bad')", "os.kill(os.getpid(), 9)")
    results = forks.run(script, what, 60, anew)
    assert [code for code, _ in results] == [0, 3, 1, -signal.SIGKILL]
    assert [f"output of {i} {script.parent}" in text for i, (_, text) in enumerate(results)] == [True] * 4
    assert "ValueError: bad" in results[2][1]


def test_run__draws_differ_between_processes_that_seed_nothing(script: Path) -> None:
    draw = "import torch, random, numpy\nprint(torch.rand(1).item(), random.random(), numpy.random.rand(), file=sys.stderr)"
    results = forks.run(script, environments(script.parent, draw, draw), 60)
    first, second = (text.splitlines()[-1].split() for _, text in results)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_run__too_long(script: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        forks.run(script, environments(script.parent, "time.sleep(100)", ""), 2)
    assert "output of 0" in str(caught.value.stderr)
    assert gone(int((script.parent / "pid0").read_text()))


def test_run__after_an_interruption_the_next_one_gets_its_own_answer(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    forks.run(script, environments(script.parent, ""), 60)  # the server is there
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            forks.run(script, environments(script.parent, "time.sleep(3)"), 60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pid = int((script.parent / "pid0").read_text())
    end = time.monotonic() + 2
    while not gone(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(pid)
    assert [code for code, _ in forks.run(script, environments(script.parent, "sys.exit(3)"), 60)] == [3]
