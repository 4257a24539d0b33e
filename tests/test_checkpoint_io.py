from pathlib import Path

import pytest
import torch

from vil_lightning.checkpoint_io import AtomicCheckpointIO


def test_save_checkpoint__round_trip_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))
    assert list(path.parent.iterdir()) == [path]


def test_save_checkpoint__a_failure_keeps_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": 1}, path)

    def half_written(checkpoint: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"x": 2}, path)
    assert torch.load(path, weights_only=True) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]
