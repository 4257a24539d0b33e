"""What an evaluation leaves behind: `results.json`, a table, a model card; and several of them side by side."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torchvision
from rich.console import Console
from rich.table import Table

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.scores import Score

FORMAT = 1  # of results.json


def circumstances() -> dict[str, Any]:
    """Date, hardware and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": f"{device}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "lightning": lightning.__version__,
        },
    }


def processor() -> str:
    """Its name, where Linux tells; otherwise its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """`folder/results.json`, written under another name first, so that an interrupted write leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / "results.json", folder / "results.json.tmp"
    with temporary.open("w") as file:
        json.dump({"format": FORMAT, **results}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """A `results.json`, or the one in a folder.

    Raises:
        ConfigError: If it is none.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no results.json of `main.py evaluate` ({error}).") from error
    if not isinstance(results, dict) or "scores" not in results or results.get("format") != FORMAT:
        raise ConfigError(f"{path} is no results.json of `main.py evaluate` in format {FORMAT}.")
    return results


# --- one evaluation ---------------------------------------------------------------------------------------------------


def cell(score: dict[str, Any]) -> str:
    """A score with its interval, "93.1 (91.0 to 95.2)"."""
    if score["low"] is None:
        return f"{score['value']:.1f}"
    return f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f})"


def print_table(results: dict[str, Any]) -> None:
    table = Table(title=f"{results['name']} on {results['data']['name']}", title_justify="left")
    table.add_column("score")
    table.add_column("% (95 % interval)", justify="right")
    table.add_column("read-out")
    table.add_column("protocol", overflow="fold")
    for score in results["scores"]:
        table.add_row(score["name"], cell(score), score["readout"], score["protocol"])
    Console(width=max(120, Console().width)).print(table)


def as_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [asdict(score) for score in scores]


def model_card(results: dict[str, Any], pictures: dict[str, str]) -> str:
    """Markdown.

    Args:
        results: As in `results.json`.
        pictures: Captions of the pictures: file name next to the card -> caption.
    """
    backbone, data = results["backbone"], results["data"]
    lines = [f"# {results['name']}", "", "## Network", ""]
    lines += [f"- architecture: `{backbone['name']}`, {backbone['parameters'] / 1e6:.2f} M parameters"]
    lines += [f"- arguments: `{json.dumps(backbone['kwargs'])}`", f"- weights: `{backbone['weights']}`"]
    lines += [f"- SHA-256 of the weights: `{backbone['hash']}`", "", "## Scores", ""]
    lines.append(
        f"On {data['name']} (`{data['options'] or 'built in'}`): {data['num_train']:,} training and {data['num_val']:,} val "
        f"images, {data['num_classes']} classes; {data['transform']}; {results['precision']} precision."
    )
    lines += ["", "| score | % (95 % bootstrap interval) | read-out | protocol |", "|---|---:|---|---|"]
    lines += [f"| {s['name']} | {cell(s)} | {s['readout']} | {s['protocol']} |" for s in results["scores"]]
    notes = list(dict.fromkeys(f"- {s['name']}: {note}" for s in results["scores"] for note in s.get("notes", ())))
    lines += ["", "Notes:", "", *notes] if notes else []
    for file, caption in pictures.items():
        lines += ["", f"![{caption}]({file})", "", caption]
    lines += ["", "## How it was measured", "", f"- command: `{results['command']}`"]
    lines += [f"- {key}: {results[key]}" for key in ("date", "hardware")]
    lines.append("- " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    lines += [f"- SHA-256 of the {split} images: `{data['hashes'][split]}`" for split in data["hashes"]]
    return "\n".join(lines) + "\n"


# --- several side by side ---------------------------------------------------------------------------------------------


def comparison(all_results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each evaluation, a column for each score that any of them has.

    Raises:
        ConfigError: If scores of one name were not measured on the same images by the same protocol.
    """
    columns: dict[str, str] = {}
    for results in all_results:
        for score in results["scores"]:
            if columns.setdefault(score["name"], score["protocol"]) != score["protocol"]:
                raise ConfigError(
                    f"{results['name']}: {score['name']} was measured by {score['protocol']}, elsewhere by "
                    f"{columns[score['name']]}. Only equal protocols can be compared."
                )
    hashes = {json.dumps(results["data"]["hashes"], sort_keys=True) for results in all_results}
    if len(hashes) > 1:
        names = ", ".join(f"{results['name']}: {results['data']['name']}" for results in all_results)
        raise ConfigError(f"The evaluations were made on different images ({names}).")
    lines = ["| network | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for results in all_results:
        found = {score["name"]: cell(score) for score in results["scores"]}
        lines.append(f"| {results['name']} | " + " | ".join(found.get(name, "") for name in columns) + " |")
    protocols = [f"- {name}: {protocol}" for name, protocol in columns.items()]
    first = all_results[0]["data"]
    head = f"{first['name']}, {first['num_train']:,} training and {first['num_val']:,} val images. Percent (95 % interval)."
    return "\n".join([head, "", *lines, "", "Protocols:", "", *protocols]) + "\n"


def plot(all_results: Sequence[dict[str, Any]], path: Path) -> None:
    """Scores with their intervals, a panel for each score.

    Raises:
        ConfigError: Without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'vil-lightning[bench]'.") from error
    names = list(dict.fromkeys(score["name"] for results in all_results for score in results["scores"]))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    height = rows * (0.9 + 0.28 * len(all_results))
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, height), squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        for i, results in enumerate(all_results):
            for score in results["scores"]:
                if score["name"] == name:
                    low, high = (score["value"] if score[end] is None else score[end] for end in ("low", "high"))
                    axis.plot([low, high], [i, i], color="tab:blue", linewidth=2, solid_capstyle="butt")
                    axis.plot(score["value"], i, "o", color="tab:blue")
        axis.set_yticks(range(len(all_results)), [results["name"] for results in all_results])
        axis.set_ylim(len(all_results) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("%, with 95 % interval", fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
