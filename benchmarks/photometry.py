"""Time the batched photometry against the same operations image by image, and print Markdown tables.

    python benchmarks/photometry.py --threads 1 > benchmarks/results/photometry_<hardware>_<date>.md

Parameters are distributed as in DINO: two global and six local views of every image. kornia, which is no dependency of the
project, takes part where it can be imported.
"""

import argparse
import datetime
import importlib.util
import itertools
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import PIL
import torch
import torchvision
from lightning.fabric.utilities import move_data_to_device
from mlstm_backends import hardware  # type: ignore[import-not-found]
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as pil_functional
from torchvision.transforms.v2 import functional as TF

from vil_lightning.data import photometry
from vil_lightning.data.photometry import PARAMETERS, STAGES, Share, apply, plan

ORDERS = tuple(itertools.permutations(range(4)))
VIEWS = (  # px, probabilities of the blur and of the solarisation, views of an image
    (224, 1.0, 0.0, 1),
    (224, 0.1, 0.2, 1),
    (96, 0.5, 0.0, 6),
)
Operation = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="measurements per table entry; the median is printed")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    versions = [f"torch {torch.__version__}", f"torchvision {torchvision.__version__}", f"Pillow {PIL.__version__}"]
    if importlib.util.find_spec("kornia"):
        versions.append(f"kornia {importlib.import_module('kornia').__version__}")
    clock = (
        "wall clock, synchronised" if device.type == "cuda" else "CPU time of the process (the machine may be shared)"
    )
    print("# Photometry of DINO's views\n")
    print(f"- date: {datetime.date.today()}")
    print(f"- hardware: {hardware(args.device)}")
    print(f"- software: {', '.join(versions)}, Python {platform.python_version()}")
    print(f"- command: `python {shlex.join(sys.argv)}`")
    if hasattr(os, "getloadavg"):
        print(f"- load average of the last minute when started: {os.getloadavg()[0]:.2f}")
    print(f"- batch {args.batch}, float32, eager; {clock}; in brackets, the fastest by wall clock")
    print(f"- median of {args.rounds} rounds; in a round, all run one after the other")
    with torch.no_grad():
        print_pipelines(args, device)
        print_operations(args, device)
        print_blurs(args, device)


def print_pipelines(args: argparse.Namespace, device: torch.device) -> None:
    print("\n## All that is done to a view\n")
    print("Milliseconds per view, from uint8 images to a batch of float32. The last line is 1 + 1 + 6 views.\n")
    names: list[str] = []
    sums: list[float] = []
    for size, blur, solarize, views in VIEWS:
        images, rows = noise(args.batch, size), dino_parameters(args.batch, blur, solarize)
        on_device, pictures = images.to(device), [to_pil(image) for image in images]
        calls: dict[str, Callable[[], object]] = {"batched": partial(batched, on_device, rows)}
        if (kornia := kornia_operations()) is not None:
            calls["kornia in its place"] = partial(with_operations, on_device, rows, kornia)
        calls["torchvision, float32 one by one"] = partial(torchvision_one_by_one, on_device, rows, as_float=True)
        calls["torchvision, uint8 one by one"] = partial(torchvision_one_by_one, on_device, rows, as_float=False)
        calls["Pillow one by one"] = partial(pillow_one_by_one, pictures, rows)
        times = measure(calls, args.rounds, device)
        if not names:
            names, sums = list(calls), [0.0] * len(calls)
            print(f"| view | {' | '.join(names)} |")
            print("| --- " + "| ---: " * len(names) + "|")
        sums = [total + views * median for total, (median, _) in zip(sums, times, strict=True)]
        cells = [f"{1000 * median / args.batch:.2f} ({1000 * best / args.batch:.2f})" for median, best in times]
        print(f"| {size} px, blur {blur}, solarisation {solarize} | {' | '.join(cells)} |", flush=True)
    cells = [f"{1000 * total / args.batch:.2f} ({total / sums[0]:.1f}×)" for total in sums]
    print(f"| an image, 8 views | {' | '.join(cells)} |")


def print_operations(args: argparse.Namespace, device: torch.device) -> None:
    print("\n## One operation on every image of the batch\n")
    print("Milliseconds per image, float32 images, other parameters for every image.\n")
    ours, kornia = own_operations(), kornia_operations()
    print("| operation | px | batched | torchvision one by one |" + (" kornia |" if kornia else ""))
    print("| --- " + "| ---: " * (4 if kornia else 3) + "|")
    for size, name in itertools.product((224, 96), ours):
        images = torch.rand(args.batch, 3, size, size, device=device)
        share, amounts = full_share(name, args.batch, device)
        calls: dict[str, Callable[[], object]] = {
            "batched": partial(photometry._change, images, share, ours[name]),
            "torchvision": partial(torchvision_each, name, images, amounts),
        }
        if kornia:
            calls["kornia"] = partial(photometry._change, images, share, kornia[name])
        times = measure(calls, args.rounds, device)
        cells = [f"{1000 * median / args.batch:.3f} ({1000 * best / args.batch:.3f})" for median, best in times]
        print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


def print_blurs(args: argparse.Namespace, device: torch.device) -> None:
    print("\n## Ways to blur every image by a sigma of its own\n")
    print(
        "Milliseconds per image. In pieces of the size that stays in the cache, as `apply` does it on a CPU, and at once.\n"
    )
    ways: dict[str, Operation] = {
        "grouped convolution": photometry._blur,
        "banded matrices": banded_matrices,
        "shifted sums": shifted_sums,
    }
    print("| px | " + " | ".join(f"{way}, {how}" for way in ways for how in ("in pieces", "at once")) + " |")
    print("| ---: " * (2 * len(ways) + 1) + "|")
    for size in (224, 96):
        images = torch.rand(args.batch, 3, size, size, device=device)
        share, _ = full_share("blur", args.batch, device)
        calls: dict[str, Callable[[], object]] = {}
        for name, way in ways.items():
            calls[f"{name}, in pieces"] = partial(photometry._change, images, share, way)
            calls[f"{name}, at once"] = partial(way, images, share.amount)
        times = measure(calls, args.rounds, device)
        cells = [f"{1000 * median / args.batch:.3f} ({1000 * best / args.batch:.3f})" for median, best in times]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


# --- what is measured -------------------------------------------------------------------------------------------------


def own_operations() -> dict[str, Operation]:
    names = ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
    return {name: getattr(photometry, f"_{name}") for name in names}


def kornia_operations() -> dict[str, Operation] | None:
    """Functions of kornia for the operations of `photometry`, with parameters of their own for every image."""
    if not importlib.util.find_spec("kornia"):
        return None
    enhance, filters = importlib.import_module("kornia.enhance"), importlib.import_module("kornia.filters")
    color = importlib.import_module("kornia.color")

    def blur(images: Tensor, taps: Tensor) -> Tensor:
        radius = taps.shape[1] // 2
        distance = torch.arange(-radius, radius + 1, device=taps.device)
        sigma = (taps * distance**2).sum(1).sqrt()  # the taps have the variance of the blur
        return filters.gaussian_blur2d(images, taps.shape[1], sigma[:, None].expand(-1, 2), border_type="replicate")

    return {
        "brightness": lambda images, factor: enhance.adjust_brightness_accumulative(images, factor.flatten()),
        "contrast": lambda images, factor: enhance.adjust_contrast_with_mean_subtraction(images, factor.flatten()),
        "saturation": lambda images, factor: enhance.adjust_saturation_with_gray_subtraction(images, factor.flatten()),
        "hue": lambda images, shift: enhance.adjust_hue(images, 2 * math.pi * shift.flatten()),
        "grayscale": lambda images, _: color.rgb_to_grayscale(images).expand_as(images),
        "blur": blur,
        "solarize": lambda images, _: enhance.solarize(images, 0.5),
    }


def batched(images: Tensor, rows: Tensor) -> Tensor:
    return apply(images, move_data_to_device(plan(rows), images.device), STAGES)


def with_operations(images: Tensor, rows: Tensor, operations: dict[str, Operation]) -> Tensor:
    """`apply` in DINO's order with other functions for the operations."""
    todo = move_data_to_device(plan(rows), images.device)
    images = images / 255
    photometry._change(images, todo.flip, photometry._flip)
    for shares in todo.jitter:
        for name, share in zip(("brightness", "contrast", "saturation", "hue"), shares, strict=True):
            photometry._change(images, share, operations[name])
    for name in ("grayscale", "blur", "solarize"):
        photometry._change(images, getattr(todo, name), operations[name])
    return images


def torchvision_operation(name: str, image: Tensor, amount: float) -> Tensor:
    """On one image (3, H, W), uint8 or float32; the Gaussian is cut off at three standard deviations."""
    if name in ("brightness", "contrast", "saturation", "hue"):
        return getattr(TF, f"adjust_{name}")(image, amount)
    if name == "grayscale":
        return TF.rgb_to_grayscale(image, num_output_channels=3)
    if name == "solarize":
        return TF.solarize(image, 127.5 / 255 if image.is_floating_point() else 128)
    kernel = 2 * math.ceil(3 * amount) + 1
    return TF.gaussian_blur(image, [kernel, kernel], [amount, amount])


def torchvision_each(name: str, images: Tensor, amounts: list[float]) -> list[Tensor]:
    return [torchvision_operation(name, image, amount) for image, amount in zip(images, amounts, strict=True)]


def torchvision_one_by_one(images: Tensor, rows: Tensor, as_float: bool) -> Tensor:
    images = images / 255 if as_float else images
    results = []
    for image, row in zip(images, rows.tolist(), strict=True):
        value = dict(zip(PARAMETERS, row, strict=True))
        image = TF.horizontal_flip(image) if value["flip"] else image
        for name in operations_of(value):
            image = torchvision_operation(name, image, value.get(name, value["sigma"]))
        results.append(image)
    return torch.stack(results) if as_float else torch.stack(results) / 255


def pillow_one_by_one(pictures: list[Image.Image], rows: Tensor) -> Tensor:
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    results = []
    for picture, row in zip(pictures, rows.tolist(), strict=True):
        value = dict(zip(PARAMETERS, row, strict=True))
        picture = ImageOps.mirror(picture) if value["flip"] else picture
        for name in operations_of(value):
            if name in enhance:
                picture = enhance[name](picture).enhance(value[name])
            elif name == "hue":
                picture = pil_functional.adjust_hue(picture, value["hue"])
            elif name == "grayscale":
                picture = picture.convert("L").convert("RGB")
            elif name == "blur":
                picture = picture.filter(ImageFilter.GaussianBlur(radius=value["sigma"]))
            else:
                picture = ImageOps.solarize(picture)
        results.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(results) / 255


def operations_of(value: dict[str, float]) -> list[str]:
    """Names of what is done to an image, in DINO's order, without the flip."""
    jitter = ("brightness", "contrast", "saturation", "hue")
    names = [jitter[i] for i in ORDERS[int(value["order"])] if value[jitter[i]] != (0 if jitter[i] == "hue" else 1)]
    return names + [
        n for n, key in (("grayscale", "grayscale"), ("blur", "sigma"), ("solarize", "solarize")) if value[key]
    ]


def banded_matrices(images: Tensor, taps: Tensor) -> Tensor:
    """Blur of square images as A x Aᵀ; the rows of A are the shifted taps, what leaves the image is added to its edge."""
    n, channels, size, _ = images.shape
    radius = taps.shape[1] // 2
    offsets = torch.arange(-radius, radius + 1, device=taps.device)
    columns = (torch.arange(size, device=taps.device)[:, None] + offsets).clamp(0, size - 1)
    matrix = taps.new_zeros(n, size, size)
    matrix.scatter_add_(2, columns.expand(n, -1, -1), taps[:, None].expand(-1, size, -1))
    images = torch.bmm(images.view(n, channels * size, size), matrix.mT).view_as(images)
    return matrix[:, None] @ images


def shifted_sums(images: Tensor, taps: Tensor) -> Tensor:
    """Blur as a sum of shifted images, two taps of the same weight at a time."""
    radius = taps.shape[1] // 2
    weights = taps.view(len(taps), -1, 1, 1, 1)
    for dim, pad in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        size, padded = images.shape[dim], F.pad(images, pad, mode="replicate")
        images = images * weights[:, radius]
        for i in range(1, radius + 1):
            pair = padded.narrow(dim, radius - i, size) + padded.narrow(dim, radius + i, size)
            images.addcmul_(pair, weights[:, radius + i])
    return images


# --- helpers ----------------------------------------------------------------------------------------------------------


def dino_parameters(n: int, blur: float, solarize: float) -> Tensor:
    """Rows (n, 9) as drawn in DINO: jitter of strengths (0.4, 0.4, 0.2, 0.1) with probability 0.8, and so on."""
    jitter = torch.rand(n) < 0.8
    shifts = {name: jitter * (2 * torch.rand(n) - 1) for name in ("brightness", "contrast", "saturation", "hue")}
    columns = {
        "flip": torch.rand(n) < 0.5,
        "brightness": 1 + 0.4 * shifts["brightness"],
        "contrast": 1 + 0.4 * shifts["contrast"],
        "saturation": 1 + 0.2 * shifts["saturation"],
        "hue": 0.1 * shifts["hue"],
        "order": torch.randint(24, (n,)),
        "grayscale": torch.rand(n) < 0.2,
        "sigma": (torch.rand(n) < blur) * (0.1 + 1.9 * torch.rand(n)),
        "solarize": torch.rand(n) < solarize,
    }
    return torch.stack([columns[name].float() for name in PARAMETERS], dim=1)


def full_share(name: str, n: int, device: torch.device) -> tuple[Share, list[float]]:
    """A share with all n images, and how much of the operation each gets (sigmas of the blur)."""
    rows = dino_parameters(n, blur=1.0, solarize=0.0)
    column = rows[:, PARAMETERS.index("sigma" if name == "blur" else name)]
    share = plan(rows).blur if name == "blur" else Share(torch.arange(n), column.view(-1, 1, 1, 1))
    return move_data_to_device(share, device), column.tolist()


def noise(n: int, size: int) -> Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[tuple[float, float]]:
    """Of every call, the median of its seconds (CPU time on a CPU, wall clock on a GPU) and its fastest wall clock."""
    for call in calls.values():
        call()  # warm-up
    taken = [[seconds(call, device) for call in calls.values()] for _ in range(rounds)]
    results = []
    for times in zip(*taken, strict=True):
        cpu, wall = zip(*times, strict=True)
        results.append((statistics.median(wall if device.type == "cuda" else cpu), min(wall)))
    return results


def seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """CPU time of the process, and wall clock."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    synchronise()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
