"""Notes beside scores."""

from pathlib import Path
from typing import Any

from vil_lightning.evaluation import report
from vil_lightning.evaluation.scores import Score


def results(*scores: Score) -> dict[str, Any]:
    return {
        "name": "x",
        "backbone": {"name": "n", "kwargs": {}, "weights": None, "hash": "h", "parameters": 1},
        "data": {
            "name": "d",
            "options": "",
            "num_train": 1,
            "num_val": 1,
            "num_classes": 2,
            "transform": "t",
            "hashes": {"train": "a", "val": "b"},
        },
        "precision": "32",
        "scores": report.as_dicts(scores),
        "command": "c",
        **report.circumstances(),
    }


def test_model_card__lists_notes_under_the_table_once() -> None:
    noted = Score("probe", 50.0, 40.0, 60.0, "p", 10, notes=("chosen so", "chosen so", "a deviation"))
    card = report.model_card(results(Score("knn", 1.0, 0.0, 2.0, "k", 10), noted), {})
    lines = card.splitlines()
    start = lines.index("Notes:")
    assert lines[start + 2 : start + 5] == ["- probe: chosen so", "- probe: a deviation", ""]
    assert start > lines.index("| probe | 50.0 (40.0 to 60.0) |  | p |")
    assert "Notes:" not in report.model_card(results(Score("knn", 1.0, 0.0, 2.0, "k", 10)), {})


def test_results__notes_are_kept_and_old_files_without_them_are_read(tmp_path: Path) -> None:
    found = results(Score("probe", 50.0, 40.0, 60.0, "p", 10, notes=("chosen so",)))
    kept = report.read_results(report.write_results(tmp_path, found))
    assert kept["scores"][0]["notes"] == ["chosen so"]
    for score in found["scores"]:
        del score["notes"]
    report.write_results(tmp_path, found)
    old = report.read_results(tmp_path)
    assert "| x | 50.0 (40.0 to 60.0) |" in report.comparison([old, kept])
    assert "Notes:" not in report.model_card(old, {})
