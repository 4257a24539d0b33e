"""`--resume auto`: one command starts a run, continues it after any fault, and does nothing once it is finished."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shrunk import PRETRAIN, Command
from test_bad_input import assert_refused

FOLDER = "checkpoints/pretrain_dino"
# The tests run with torch's deterministic algorithms, whose sums round differently: so do the runs that are compared with them.
TWO = [*PRETRAIN, "--trainer.max_epochs", "2", "--model.lr_warmup", "1 steps", "--trainer.deterministic", "warn"]
AUTO = ["--resume", "auto"]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = state_of(a), state_of(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint at the end of two epochs without a fault."""
    from shrunk import invoke

    folder = tmp_path_factory.mktemp("whole")
    before = torch.are_deterministic_algorithms_enabled()
    result = invoke(TWO, folder)
    torch.use_deterministic_algorithms(before)
    assert result.code == 0, result.err
    return folder / FOLDER / "last.ckpt"


def test_resume_auto__starts_continues_and_ends(tmp_path: Path, command: Command, whole: Path) -> None:
    first = command(*TWO, *AUTO)
    assert first.code == 0, first.err
    assert "resumed at" not in first.out
    assert_same_weights(tmp_path / FOLDER / "last.ckpt", whole)
    # As if it had been killed before its second epoch was written.
    (tmp_path / FOLDER / "last-1.ckpt").rename(tmp_path / FOLDER / "last.ckpt")
    (tmp_path / FOLDER / ".last.ckpt.99999.partial").write_bytes(b"half")
    second = command(*TWO, *AUTO)
    assert second.code == 0, second.err
    assert "resumed at" in second.out
    assert_same_weights(tmp_path / FOLDER / "last.ckpt", whole)
    assert not list((tmp_path / FOLDER).glob(".*"))
    written = (tmp_path / FOLDER / "last.ckpt").stat().st_mtime_ns
    third = command(*TWO, *AUTO)
    assert third.code == 0, third.err
    assert (tmp_path / FOLDER / "last.ckpt").stat().st_mtime_ns == written


def test_resume_auto__passes_over_a_damaged_checkpoint(tmp_path: Path, command: Command, whole: Path) -> None:
    assert command(*TWO, *AUTO).code == 0
    last = tmp_path / FOLDER / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    result = command(*TWO, *AUTO)
    assert result.code == 0, result.err
    assert_same_weights(last, whole)


def test_resume_auto__refuses_when_all_are_damaged(with_run: Path, command: Command) -> None:
    for path in (with_run / FOLDER).glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert_refused(command(*PRETRAIN, *AUTO), "resume=auto", "last.ckpt is damaged", "--run_name", "--overwrite")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--ckpt_path", f"{FOLDER}/last.ckpt"], ["resume=auto", "ckpt_path=checkpoints"]),
        (["--overwrite", "true"], ["resume=auto", "overwrite=true"]),
    ],
)
def test_resume_auto__refuses_contradictions(
    with_run: Path, command: Command, args: list[str], parts: list[str]
) -> None:
    assert_refused(command(*PRETRAIN, *AUTO, *args), *parts)


def test_resume_never__offers_auto(with_run: Path, command: Command) -> None:
    assert_refused(command(*PRETRAIN), "already holds", "--resume auto", f"--ckpt_path {FOLDER}/last.ckpt")


def test_ckpt_path__refuses_a_flipped_bit(with_run: Path, command: Command) -> None:
    last = with_run / FOLDER / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    assert_refused(command(*PRETRAIN, "--ckpt_path", last), "ckpt_path", "last.ckpt is damaged", "hash")


def test_keep__in_the_background(tmp_path: Path, command: Command, whole: Path) -> None:
    result = command(*TWO, "--keep.asynchronous", "true", "--keep.last", "1")
    assert result.code == 0, result.err
    assert_same_weights(tmp_path / FOLDER / "last.ckpt", whole)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {"last.ckpt", "best.ckpt"}


@pytest.mark.parametrize("key", ["checkpoint.dirpath", "trainer.logger"])
def test_folders__that_cannot_be_written_are_refused_at_once(tmp_path: Path, command: Command, key: str) -> None:
    """A file where a folder should be: permissions mean nothing to an administrator, who may run the tests."""
    if key == "checkpoint.dirpath":
        (tmp_path / "blocked").write_text("")
        result = command(*PRETRAIN, "--checkpoint.dirpath", "blocked/checkpoints")
    else:
        (tmp_path / "logs").write_text("")
        result = command(*PRETRAIN)
    assert_refused(result, "cannot be written", key)


@pytest.mark.timeout(200)
def test_signal__a_real_process_can_be_stopped_and_continued(tmp_path: Path, command: Command, whole: Path) -> None:
    main = Path(__file__).parents[2] / "main.py"
    args = [sys.executable, str(main), *TWO, *AUTO]
    process = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"{FOLDER}/last.ckpt")) and process.poll() is None:
            assert time.monotonic() < deadline, "no first epoch"
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # It may have been at its end already.
    assert process.returncode in (143, 0), err
    result: SimpleNamespace = command(*TWO, *AUTO)
    assert result.code == 0, result.err
    assert_same_weights(tmp_path / FOLDER / "last.ckpt", whole)


def test_worker__killed_while_the_main_process_computes_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised in a signal handler: in the middle of a step, if that is where the main process is."""
    from vil_lightning.methods import DINO

    def step(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. \nand more")

    monkeypatch.setattr(DINO, "training_step", step)
    result = command(*PRETRAIN)
    assert result.code == 2, result.err
    assert "error: A data worker died or stopped answering (DataLoader worker (pid 17) is killed" in result.err
    assert "data.num_workers" in result.err
    assert "Traceback" not in result.err
