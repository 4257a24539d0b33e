"""Embeddings as a file that other programs read: Parquet or NumPy's npz."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.features import FeatureSet

_ROWS = 4096  # written at a time


def check_embeddings_path(path: Path) -> None:
    """Refuse a file that `write_embeddings` could not write, before there is anything to write.

    Raises:
        ConfigError: If its name does not end in .npz or .parquet, or pyarrow is missing for the latter.
    """
    if path.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"embeddings={path} must end in .npz or .parquet.")
    if path.suffix == ".parquet":
        _pyarrow()


def write_embeddings(feature_set: FeatureSet, names: Sequence[str], path: Path, labelled: bool = True) -> None:
    """Write `id`, `label` and `vector` of every image, in parts; the file appears complete or not at all.

    A `.parquet` file has these columns, vectors being lists of D floats; a `.npz` file has the arrays `ids`, `labels` and
    `vectors` (N, D). Vectors are in float32.

    Args:
        names: What to call the images of the source, in its order; those that were left out included.
        labelled: Whether labels mean anything; without, they are not written.
    """
    check_embeddings_path(path)
    if int(feature_set.indices.max()) >= len(names):
        raise ValueError(f"{len(names)} names are too few for image {int(feature_set.indices.max())}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    ids = [str(names[i]) for i in feature_set.indices.tolist()]
    (_write_parquet if path.suffix == ".parquet" else _write_npz)(feature_set, ids, unfinished, labelled)
    os.replace(unfinished, path)


def _write_parquet(feature_set: FeatureSet, ids: list[str], path: Path, labelled: bool) -> None:
    pyarrow, parquet = _pyarrow()
    dim = feature_set.features.shape[1]
    types = {"id": pyarrow.string(), "label": pyarrow.int64(), "vector": pyarrow.list_(pyarrow.float32(), dim)}
    if not labelled:
        del types["label"]
    schema = pyarrow.schema(list(types.items()), metadata={"readout": feature_set.readout, "key": feature_set.key})
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            vectors = pyarrow.array(feature_set.features[rows].float().reshape(-1).numpy())
            vectors = pyarrow.FixedSizeListArray.from_arrays(vectors, dim)
            columns = {"id": pyarrow.array(ids[rows]), "vector": vectors}
            if labelled:
                columns["label"] = pyarrow.array(feature_set.labels[rows].numpy())
            writer.write_table(pyarrow.Table.from_arrays([columns[name] for name in types], schema=schema))


def _write_npz(feature_set: FeatureSet, ids: list[str], path: Path, labelled: bool) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(feature_set.features.shape)}
    with zipfile.ZipFile(path, "w") as archive:
        arrays = {"ids": np.array(ids, dtype=np.str_), "labels": feature_set.labels.numpy()}
        if not labelled:
            del arrays["labels"]
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        # numpy would need all vectors in memory, in float32.
        with archive.open("vectors.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for rows in feature_set.features.split(_ROWS):
                file.write(rows.float().numpy().astype("<f4").tobytes())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("embeddings: .parquet needs pyarrow (pip install pyarrow). Or write an .npz.") from error
    return pyarrow, pyarrow.parquet
