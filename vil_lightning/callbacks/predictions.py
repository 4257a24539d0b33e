"""Predictions as a table."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from vil_lightning.errors import ConfigError


class PredictionWriter(L.Callback):
    """Writes what `predict` returns: a row per image with its most likely classes and their probabilities.

    Args:
        path: A `.csv` or (with pyarrow installed) `.parquet` file; `predictions.csv` in the run's log folder if None.
        overwrite: Replace an existing file.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        if path is not None and Path(path).suffix not in (".csv", ".parquet"):
            raise ConfigError(f"predictions.path={path} must end in .csv or .parquet.")
        if path is not None and Path(path).suffix == ".parquet":
            _pyarrow()
        self.path = path
        self.overwrite = overwrite
        self._parts: list[dict[str, Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            path = self._path(trainer)
            if path.exists() and not self.overwrite:
                raise ConfigError(
                    f"{path} exists. Choose another --predictions.path, or replace it with --overwrite true."
                )

    def _path(self, trainer: L.Trainer) -> Path:
        log_dir = trainer.log_dir  # a broadcast: every process must ask
        return Path(self.path) if self.path is not None else Path(log_dir or ".") / "predictions.csv"

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if isinstance(outputs, dict) and {"positions", "classes", "probabilities"} <= outputs.keys():
            self._parts.append({key: value.cpu() for key, value in outputs.items()})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self._path(trainer)
        parts, self._parts = self._parts, []
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for of_one in gathered for part in of_one]
        if not parts or not trainer.is_global_zero:
            return
        table = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        order = table["positions"].argsort()
        data = trainer.datamodule  # type: ignore[attr-defined]
        names, known = data.predict_names, getattr(pl_module, "classes", [])
        if not known and len(data.classes) == getattr(pl_module, "num_classes", None):
            known = data.classes  # published weights hold no names; the folders of the data they belong to do
        rows = prediction_rows(
            [names[i] for i in table["positions"][order].tolist()],
            table["classes"][order],
            table["probabilities"][order],
            known,
        )
        write_table(rows, path)
        Console().print(f"Predictions of {len(rows)} images: {path}", soft_wrap=True)


def prediction_rows(
    images: list[str], classes: Tensor, probabilities: Tensor, class_names: list[str]
) -> list[dict[str, Any]]:
    """One dictionary per image: `image`, and `class1`, `name1` (if there are names), `probability1`, `class2`, …

    Args:
        classes: (N, k), most likely first.
        probabilities: (N, k).
    """
    rows = []
    for image, top, shares in zip(images, classes.tolist(), probabilities.tolist(), strict=True):
        row: dict[str, Any] = {"image": image}
        for rank, (index, share) in enumerate(zip(top, shares, strict=True), start=1):
            row[f"class{rank}"] = index
            if class_names:
                row[f"name{rank}"] = class_names[index]
            row[f"probability{rank}"] = round(share, 6)
        rows.append(row)
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of equal keys as `.csv` or `.parquet`; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    if path.suffix == ".parquet":
        pyarrow, parquet = _pyarrow()
        parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
    else:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    os.replace(unfinished, path)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("predictions.path: .parquet needs pyarrow (pip install pyarrow). Or write a .csv.") from error
    return pyarrow, pyarrow.parquet
