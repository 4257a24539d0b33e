"""Freed memory stays with a process that computes on a CPU."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vil_lightning import allocator, cli

ROOT = Path(__file__).parents[1]
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")

PROGRAM = """
import resource, sys
import torch
from vil_lightning.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)

def layers():
    for size in (50, 20, 70):  # MB
        torch.ones(size * 250_000)

layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@glibc
def test_keep_freed_memory__the_same_pages_are_used_again() -> None:
    faults = {}
    for way in ("keep", "default"):
        command = [sys.executable, "-c", PROGRAM, way]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        faults[way] = int(result.stdout)
    assert faults["keep"] < 100  # 140 MB are 35,000 pages of 4 KiB, or 70 of 2 MiB
    assert faults["default"] > 2 * faults["keep"]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_CONF", "LD_PRELOAD", "GLIBC_TUNABLES"])
def test_keep_freed_memory__what_the_environment_sets_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # not to be called
    assert allocator.keep_freed_memory() is False


def test_keep_freed_memory__other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("words", [["evaluate"], ["speed"], ["fit"]])
def test_main__keeps_memory_where_there_is_no_gpu(words: list[str], gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    for name in ("evaluation_command", "speed_command", "check_sections", "build_cli"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    cli.main(words)
    assert called == ([] if gpu else [True])
