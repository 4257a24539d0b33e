"""Predictions as a table: rows, names, order and files."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vil_lightning.callbacks import PredictionWriter
from vil_lightning.callbacks.predictions import prediction_rows, write_table
from vil_lightning.errors import ConfigError

CLASSES, SHARES = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.33333334]])


def test_rows__with_names() -> None:
    assert prediction_rows(["a.png", "b.png"], CLASSES, SHARES, ["cat", "dog", "owl"]) == [
        {"image": "a.png", "class1": 2, "name1": "owl", "probability1": 0.75, "class2": 0, "name2": "cat"}
        | {"probability2": 0.25},
        {"image": "b.png", "class1": 1, "name1": "dog", "probability1": 0.5, "class2": 2, "name2": "owl"}
        | {"probability2": 0.333333},
    ]


def test_rows__without_names() -> None:
    rows = prediction_rows(["a.png", "b.png"], CLASSES, SHARES, [])
    assert list(rows[0]) == ["image", "class1", "probability1", "class2", "probability2"]
    with pytest.raises(ValueError, match="zip"):
        prediction_rows(["a.png"], CLASSES, SHARES, [])  # a row is missing: no shifted table


def test_csv__complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/table.csv"
    write_table([{"image": 'odd, "name".png', "class1": 1}], path)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"image": 'odd, "name".png', "class1": "1"}]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="wings"):
        write_table([{"image": "a"}, {"image": "b", "wings": 2}], path)
    assert path.read_bytes() == before


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = prediction_rows(["a.png", "b.png"], CLASSES, SHARES, [])
    write_table(rows, tmp_path / "table.parquet")
    assert parquet.read_table(tmp_path / "table.parquet").to_pylist() == rows


def test_parquet__without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"predictions\.path: \.parquet needs pyarrow \(pip install pyarrow\)"):
        PredictionWriter("table.parquet")
    PredictionWriter("table.csv")


@pytest.mark.parametrize("path", ["table.txt", "table", "table.CSV.gz"])
def test_path__of_another_kind(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"predictions\.path={path} must end in \.csv or \.parquet"):
        PredictionWriter(path)


def finish(writer: PredictionWriter, parts: list[Any], tmp_path: Path, names: list[str] = ["x", "y", "z"]) -> None:  # noqa: B006
    trainer: Any = SimpleNamespace(
        log_dir=str(tmp_path / "logs"),
        world_size=1,
        is_global_zero=True,
        datamodule=SimpleNamespace(predict_names=names, classes=["cat", "dog", "owl"]),
    )
    for number, part in enumerate(parts):
        writer.on_predict_batch_end(trainer, None, part, None, number)  # type: ignore[arg-type]
    writer.on_predict_end(trainer, SimpleNamespace(classes=["cat", "dog", "owl"]))  # type: ignore[arg-type]


def test_writer__sorts_the_images_of_all_batches(tmp_path: Path) -> None:
    parts = [
        {"positions": torch.tensor([2, 0]), "classes": CLASSES, "probabilities": SHARES},
        {"positions": torch.tensor([1]), "classes": CLASSES[:1], "probabilities": SHARES[:1]},
    ]
    writer = PredictionWriter()
    finish(writer, parts, tmp_path)
    table = (tmp_path / "logs/predictions.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in table[1:]] == [["x", "1", "dog"], ["y", "2", "owl"], ["z", "2", "owl"]]
    finish(writer, parts[1:], tmp_path)  # a second prediction starts anew
    assert len((tmp_path / "logs/predictions.csv").read_text().splitlines()) == 2


def test_writer__writes_where_it_is_told(tmp_path: Path) -> None:
    part = {"positions": torch.tensor([0, 1]), "classes": CLASSES, "probabilities": SHARES}
    finish(PredictionWriter(str(tmp_path / "here.csv")), [part], tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["here.csv"]


def test_writer__leaves_other_outputs_alone(tmp_path: Path) -> None:
    finish(PredictionWriter(), [torch.zeros(3), {"features": torch.zeros(3)}, None], tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_writer__does_not_replace_a_table(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("precious")
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"--predictions\.path.*--overwrite"):
        PredictionWriter().setup(trainer, None, "predict")  # type: ignore[arg-type]
    PredictionWriter(overwrite=True).setup(trainer, None, "predict")  # type: ignore[arg-type]
    PredictionWriter().setup(trainer, None, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_classes", "named"), [(3, True), (4, False)])
def test_writer__takes_names_from_the_folders_of_the_data(tmp_path: Path, num_classes: int, named: bool) -> None:
    writer, data = PredictionWriter(), SimpleNamespace(predict_names=["x", "y", "z"], classes=["cat", "dog", "owl"])
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path), world_size=1, is_global_zero=True, datamodule=data)
    part = {"positions": torch.tensor([0, 1]), "classes": CLASSES, "probabilities": SHARES}
    writer.on_predict_batch_end(trainer, None, part, None, 0)  # type: ignore[arg-type]
    writer.on_predict_end(trainer, SimpleNamespace(classes=[], num_classes=num_classes))  # type: ignore[arg-type]
    assert ("name1" in (tmp_path / "predictions.csv").read_text()) is named
