"""Speed of the training loaders beside their per-image PIL counterparts, and of the photometry that follows on the device.

    python benchmarks/data.py [--images 192] [--rounds 5] [--workers 2] [--out benchmarks/results/data_<hardware>_<date>.md]

Pictures of 500 x 375 px (JPEG, quality 90) are generated. In every round all loaders run one after the other over the same
files; medians of the rounds are printed.

- multi-crop: `MultiCrop` (2 x 224 px and 6 x 96 px) against lightly's `DINOTransform` with the same crops
- supervised: `TrainTransform` (3-Augment) against the same operations of torchvision on PIL pictures

"per core" is images per CPU second of a loader without workers, which depends little on what else a machine does; the time of
the photometry, which a run does on its device, is given beside it, and added to it in the last column of the table. With
workers, images per second of wall-clock time are given.
"""

import argparse
import datetime
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly
import numpy as np
import torch
import torchvision
from lightly.transforms import DINOTransform
from mlstm_backends import hardware  # type: ignore[import-not-found]
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms as T

from vil_lightning.data import ImageFolder, MultiCrop, TrainTransform

HEIGHT, WIDTH = 375, 500
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="file for the table; printed in any case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        average = write_pictures(Path(folder), args.images)
        table = measure(Path(folder), args, average)
    print(table)
    if args.out:
        Path(args.out).write_text(table)


def write_pictures(root: Path, count: int) -> float:
    """Smooth shapes with some grain, as `root/{train,val}/a/*.jpg`.

    Returns:
        Their average size in kB.
    """
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
        pixels += rng.normal(scale=8, size=pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(root / "train" / "a" / f"{i:05d}.jpg", quality=90)
    picture.save(root / "val" / "a" / "0.jpg", quality=90)
    return sum(path.stat().st_size for path in (root / "train" / "a").iterdir()) / count / 1e3


# --- loaders ------------------------------------------------------------------------------------------------------------


def ours(root: Path, transform: Any, workers: int) -> tuple[ImageFolder, DataLoader[Any]]:
    data = ImageFolder(str(root), 224, BATCH, workers, train_transform=transform, seed=0)
    data.setup("fit")
    return data, data.train_dataloader()


def reference(root: Path, transform: Callable[[Image.Image], Any], workers: int) -> DataLoader[Any]:
    dataset = torchvision.datasets.ImageFolder(str(root / "train"), transform)
    return DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


class RandomBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


def three_augment() -> T.Compose:
    """The training transform of ViL and DeiT III, one picture at a time."""
    return T.Compose(
        [
            T.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomChoice([T.Grayscale(3), T.Lambda(ImageOps.solarize), RandomBlur()]),
            T.ColorJitter(0.3, 0.3, 0.3),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


# --- measurement --------------------------------------------------------------------------------------------------------


def cpu_seconds(loader: DataLoader[Any]) -> float:
    """Of one pass over the images, for each image; without workers."""
    start = time.process_time()
    count = sum(len(batch[1]) for batch in loader)
    return (time.process_time() - start) / count


def wall_seconds(loader: DataLoader[Any]) -> float:
    """Of one pass over the images, for each image, once the workers run."""
    start = time.perf_counter()
    count = sum(len(batch[1]) for batch in loader)
    return (time.perf_counter() - start) / count


def photometry_seconds(data: ImageFolder, batch: Any, device: torch.device) -> float:
    """Of planning, moving, photometry and normalisation of a batch, for each image."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    count = len(batch[1])
    start = clock()
    data.on_after_batch_transfer(data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), device, 0), 0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / count


def measure(root: Path, args: argparse.Namespace, average: float) -> str:
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    tasks = {
        "multi-crop": (MultiCrop(num_local_views=6), DINOTransform(), "lightly's DINOTransform"),
        "supervised": (TrainTransform(224), three_augment(), "torchvision on PIL"),
    }
    times: dict[tuple[str, ...], list[float]] = {}
    for task, (fast, slow, _) in tasks.items():
        data, alone = ours(root, fast, 0)
        _, helped = ours(root, fast, args.workers)
        slow_alone, slow_helped = reference(root, slow, 0), reference(root, slow, args.workers)
        batch = next(iter(alone))
        for loader in (helped, slow_helped):  # start the workers
            next(iter(loader))
        for _ in range(args.rounds):
            times.setdefault((task, "ours"), []).append(cpu_seconds(alone))
            times.setdefault((task, "reference"), []).append(cpu_seconds(slow_alone))
            times.setdefault((task, "ours", "wall"), []).append(wall_seconds(helped))
            times.setdefault((task, "reference", "wall"), []).append(wall_seconds(slow_helped))
            for device in devices:
                times.setdefault((task, "photometry", device.type), []).append(photometry_seconds(data, batch, device))
    return report(tasks, times, args, devices, average)


def report(
    tasks: dict[str, Any],
    times: dict[tuple[str, ...], list[float]],
    args: argparse.Namespace,
    devices: list[torch.device],
    average: float,
) -> str:
    median = {key: statistics.median(values) for key, values in times.items()}
    lines = ["# Training loaders", ""]
    lines.append(f"- date: {datetime.date.today()}")
    lines.append(f"- hardware: {hardware(devices[-1].type)}")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, lightly {lightly.__version__}"
    lines.append(f"- software: {versions}, Pillow {Image.__version__}, Python {platform.python_version()}")
    lines.append(f"- command: `python {shlex.join(sys.argv)}`")
    if hasattr(os, "getloadavg"):
        lines.append(f"- load average of the last minute at the end: {os.getloadavg()[0]:.2f}")
    lines.append(f"- {args.images} pictures of {WIDTH} x {HEIGHT} px, JPEG of {average:.0f} kB; batches of {BATCH}")
    lines.append(f"- medians of {args.rounds} rounds, smallest and largest in brackets")
    names = {device.type: f"photometry on {device.type}, ms/image" for device in devices}
    lines += [
        "",
        "| | images/s per core | reference | ratio | " + " | ".join(names.values()) + " | ratio with CPU photometry |",
    ]
    lines.append("|---|" + "---:|" * (4 + len(devices)))
    for task, (_, _, name) in tasks.items():
        fast, slow = median[task, "ours"], median[task, "reference"]
        ratios = [b / a for a, b in zip(times[task, "ours"], times[task, "reference"], strict=True)]
        device_cells = " | ".join(f"{1e3 * median[task, 'photometry', device.type]:.2f}" for device in devices)
        lines.append(
            f"| {task} | {1 / fast:.0f} | {1 / slow:.0f} ({name}) | **{statistics.median(ratios):.1f}** "
            f"({min(ratios):.1f} to {max(ratios):.1f}) | {device_cells} | "
            f"{slow / (fast + median[task, 'photometry', 'cpu']):.1f} |"
        )
    lines += ["", f"Through `DataLoader` with {args.workers} workers, images per second of wall-clock time:", ""]
    lines += ["| | ours | reference | ratio |", "|---|---:|---:|---:|"]
    for task in tasks:
        fast, slow = median[task, "ours", "wall"], median[task, "reference", "wall"]
        lines.append(f"| {task} | {1 / fast:.0f} | {1 / slow:.0f} | {slow / fast:.1f} |")
    pinned = "Batches were pinned." if torch.cuda.is_available() else "Without a CUDA device, pinning is not possible."
    return "\n".join([*lines, "", pinned]) + "\n"


if __name__ == "__main__":
    main()
