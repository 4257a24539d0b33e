"""`python main.py evaluate`: score a frozen network; `compare`: several evaluations side by side; `embed`: vectors as a file.

python main.py evaluate --config configs/evaluate.yaml --weights checkpoints/pretrain_dino/last.ckpt
python main.py compare evaluations/pretrain_dino evaluations/pretrain_mae --out comparison.md --plot comparison.png
python main.py embed --config configs/embed.yaml --weights checkpoints/pretrain_dino/last.ckpt --out embeddings.parquet
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import distributed
from torchvision.utils import save_image

import vil_lightning.data  # noqa: F401 - makes the short class names known
from vil_lightning.checks import check_sections, check_values
from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.files import FileSource, paths_of
from vil_lightning.data.loading import ImageSource, SubsetSource
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import report
from vil_lightning.evaluation.cache import fingerprint
from vil_lightning.evaluation.embeddings import check_embeddings_path, write_embeddings
from vil_lightning.evaluation.pictures import patch_picture
from vil_lightning.evaluation.subject import Subject
from vil_lightning.evaluation.tasks import Task, check_readouts
from vil_lightning.methods.backbone import BackboneConfig, check_input_size, weights_hash

EVALUATION_ROOT = Path("evaluations")


def evaluate(args: list[str]) -> None:
    """Run the tasks of a recipe on a network; write results.json, the model card and its picture.

    Started by torchrun, the processes share the images and the queries of kNN, and the first one writes.
    """
    built, data = parse(evaluate_parser(), args)
    if not built.tasks:
        raise ConfigError("tasks is empty. Name at least one, see configs/evaluate.yaml.")
    first = join_processes()
    data.prepare_data()
    data.setup("fit")
    check_classes(data)
    subject = subject_of(built, data, first)
    name = built.run_name or run_name_of(subject.backbone)
    if not built.out and (Path(name).name != name or name in (".", "..")):
        raise ConfigError(f"run_name={name!r} must be a plain folder name, without slashes; or set --out to a folder.")
    network = subject.build()
    check_input_size(network, data.img_size, "data.img_size")
    for task in built.tasks:
        task.check(subject)
    scores = [score for task in built.tasks for score in task.run(subject)]
    if not first:
        return

    folder = Path(built.out) if built.out else EVALUATION_ROOT / name
    results = {
        "name": name,
        "suite": "+".join(Path(str(path)).stem for path in built.config or ()) or None,
        "backbone": {
            "name": subject.backbone.name,
            "kwargs": subject.backbone.kwargs,
            "weights": subject.backbone.weights,
            "hash": weights_hash(network),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "data": describe(data),
        "precision": built.precision,
        "scores": report.as_dicts(scores),
        "command": shlex.join(["python", "main.py", "evaluate", *args]),
        **report.circumstances(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    picture = patch_picture(subject)
    if picture is not None:
        save_image(picture.float() / 255, folder / "patches.png")
        pictures["patches.png"] = (
            "Val images and the principal components of their patch tokens; equal colours, equal tokens."
        )
    (folder / "model_card.md").write_text(report.model_card(results, pictures))
    path = report.write_results(folder, results)
    report.print_table(results)
    print(f"wrote {path} and {folder / 'model_card.md'}")


def embed(args: list[str]) -> None:
    """Write a vector for every image, for other programs: Parquet or npz.

    Started by torchrun, the processes share the images, and the first one writes.
    """
    built, data = parse(embed_parser(), args)
    check_readouts("embed", built.readout)
    path = Path(built.out)
    check_embeddings_path(path)
    if path.exists() and not built.overwrite:
        raise ConfigError(f"out={path} exists. Choose another --out, or replace it with --overwrite true.")
    first = join_processes()
    data.prepare_data()
    data.setup("predict" if built.split == "predict" else "fit")
    labelled = data.labelled
    if built.split == "predict":
        data.val_source, names = data.predict_source, data.predict_names
        labelled = labelled and getattr(data, "predict_dir", None) is None
    else:
        names = names_of(data.train_source if built.split == "train" else data.val_source, built.split)
    subject = subject_of(built, data, first)
    readout = subject.readout(built.readout)
    features = subject.features("train" if built.split == "train" else "val", [readout])[readout]
    if first:
        write_embeddings(features, names, path, labelled)
        rows, width = features.features.shape
        print(f"wrote {rows:,} vectors of {width} numbers ({readout}): {path}")


def join_processes() -> bool:
    """Join the other processes of torchrun, if there are any; whether this is the first one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return not distributed.is_initialized() or distributed.get_rank() == 0


def names_of(source: ImageSource, split: str) -> list[str]:
    """Paths of images in files, else `split/number`."""
    base = source
    while isinstance(base, SubsetSource):
        base = base.source
    return paths_of(source) if isinstance(base, FileSource) else [f"{split}/{i}" for i in range(len(source))]


def subject_parser(command: str) -> ArgumentParser:
    """What names a network and its images."""
    usage = f"main.py {command} [--config FILE] [--KEY VALUE ...] [--help]"  # all options would bury an error's message
    parser = ArgumentParser(prog=f"python main.py {command}", usage=usage, description=__doc__)
    parser.add_argument("--config", action="config", help="Recipe, see configs/evaluate.yaml.")
    parser.add_argument("--weights", type=str | None, default=None, help="Checkpoint; short for --backbone.weights.")
    parser.add_argument("--backbone", type=BackboneConfig, default=BackboneConfig(), help="The network.")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_argument("--precision", type=Literal["32", "bf16"], default="32", help="Of the features.")
    parser.add_argument("--device", type=str, default="auto", help="Where the network runs.")
    parser.add_argument("--seed", type=int, default=0, help="Of few labels, held-out images and probes.")
    parser.add_argument(
        "--cache_dir", type=str | None, default=None, help="Keep features here, for the next evaluation."
    )
    parser.add_argument("--progress", type=bool, default=True, help="Show bars.")
    return parser


def evaluate_parser() -> ArgumentParser:
    parser = subject_parser("evaluate")
    parser.add_argument("--tasks", type=list[Task], default=[], help="What to measure.")
    parser.add_argument("--run_name", type=str | None, default=None, help="What to call the network in tables.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder of the results; evaluations/<run_name>.")
    return parser


def embed_parser() -> ArgumentParser:
    parser = subject_parser("embed")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "predict"],
        default="predict",
        help="Which images: predict takes those of data.predict_dir, or the val set.",
    )
    parser.add_argument("--readout", type=str, default="auto", help="auto is the one that the network is made for.")
    parser.add_argument("--out", type=str, required=True, help="File, .parquet or .npz.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace an existing file.")
    return parser


def parse(parser: ArgumentParser, args: list[str]) -> tuple[Namespace, ImageDataModule]:
    """The arguments, with objects built, and the images."""
    check_sections(args)
    config = parser.parse_args(args)
    check_values({key: value for key, value in vars(config).items() if key != "config"})
    if config.weights is not None:
        config.backbone.weights = config.weights
    os.environ["PL_GLOBAL_SEED"] = str(config.seed)  # which data modules take theirs from
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)
    if not isinstance(built.data, ImageDataModule):
        raise ConfigError(f"data={type(built.data).__name__} is no source of images. Choose another --data.")
    return built, built.data


def subject_of(built: Namespace, data: ImageDataModule, first: bool) -> Subject:
    """The network and its images, which are set up."""
    backbone = BackboneConfig(**{**vars(built.backbone), "kwargs": dict(built.backbone.kwargs or {})})
    cache_dir = None if built.cache_dir is None else Path(built.cache_dir)
    return Subject(backbone, data, cache_dir, built.precision, built.device, built.seed, built.progress and first)


def run_name_of(backbone: BackboneConfig) -> str:
    """The run that a checkpoint belongs to, or the file's name, or the architecture."""
    if backbone.weights is None:
        return f"{backbone.name}_untrained"
    path = Path(backbone.weights)
    return path.parent.name if path.stem in ("last", "best") and path.parent.name else path.stem


def check_classes(data: ImageDataModule) -> None:
    """Refuse images that cannot be scored, before features are computed.

    Raises:
        ConfigError: Without classes, without a class in val that train has, or with labels that are no class.
    """
    if not data.labelled:
        raise ConfigError("data has no classes, which every score needs. Use labelled images.")
    for split, source in (("train", data.train_source), ("val", data.val_source)):
        labels = torch.tensor(source.labels)
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= data.num_classes:
            found = "none" if len(labels) == 0 else f"{int(labels.min())} to {int(labels.max())}"
            raise ConfigError(
                f"data: the {split} set has labels {found}, but there are {data.num_classes} classes (0 to "
                f"{data.num_classes - 1}). Repair the labels, or choose others with data.classes."
            )
        missing = sorted(set(range(data.num_classes)) - set(labels.tolist()))
        if missing:
            names = ", ".join(data.classes[number] for number in missing[:5])
            raise ConfigError(
                f"data: {len(missing)} of {data.num_classes} classes have no image in the {split} set ({names}). Add images, "
                "or leave the classes out with data.classes."
            )


def describe(data: ImageDataModule) -> dict[str, Any]:
    """What the scores were measured on."""
    return {
        "name": type(data).__name__,
        "options": data.source_options(),
        "num_train": len(data.train_source),
        "num_val": len(data.val_source),
        "num_classes": data.num_classes,
        "transform": f"short side {data.eval_transform.short_side} px, centre {data.img_size} px",
        "hashes": {"train": fingerprint(data.train_source), "val": fingerprint(data.val_source)},
    }


def compare(args: list[str]) -> None:
    """A table, and a plot if wanted, of several results.json."""
    parser = argparse.ArgumentParser(prog="python main.py compare", description="Evaluations side by side.")
    parser.add_argument("results", nargs="+", help="results.json files, or their folders")
    parser.add_argument("--out", help="file for the Markdown table; printed in any case")
    parser.add_argument("--plot", help="file for a picture of the scores")
    parsed: Namespace | argparse.Namespace = parser.parse_args(args)
    found = [report.read_results(path) for path in parsed.results]
    table = report.comparison(found)
    print(table)
    if parsed.out:
        command = shlex.join(["python", "main.py", "compare", *args])
        versions = ", ".join(f"{name} {version}" for name, version in found[0]["versions"].items())
        facts = [f"- date: {found[0]['date']}", f"- hardware: {found[0]['hardware']}", f"- software: {versions}"]
        commands = [f"- `{results['command']}`" for results in found]
        lines = ["# Comparison", "", *facts, f"- command: `{command}`", "- made by:", *(f"  {c}" for c in commands)]
        Path(parsed.out).write_text("\n".join(lines) + "\n\n" + table)
    if parsed.plot:
        report.plot(found, Path(parsed.plot))


def main(command: str, args: list[str]) -> None:
    """`evaluate`, `compare` or `embed`; what a user can repair ends with one message and exit code 2."""
    try:
        {"evaluate": evaluate, "compare": compare, "embed": embed}[command](args)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"\nerror: {cause}", file=sys.stderr)
        sys.exit(2)
