"""Look at what a recipe feeds its network, without building the network.

    python -m vil_lightning.look --config configs/pretrain_dino.yaml [--out views.png] [--images 6] [any --data.… option]

Writes one PNG: a row for each image, first as evaluation sees it, then its views in training. The batches go through the
same loader and the same operations as in a run; a device is not needed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

from vil_lightning.callbacks.drawing import Tile, enlarge, sheet
from vil_lightning.cli import VilCLI, find_repairable, silence_known_messages
from vil_lightning.data import ImageDataModule
from vil_lightning.data.loading import TransformedDataset, collate
from vil_lightning.errors import ConfigError

_DRAWS = 6  # of one image, where a recipe makes a single view of it


class DataCLI(VilCLI):
    """Reads a whole recipe, but builds its data module only."""

    def instantiate_classes(self) -> None:
        parser = ArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
        self.datamodule = instantiate(parser.parse_object({"data": self.config.data})).data


def read_data(recipe: list[str]) -> ImageDataModule:
    """The data module of a recipe, given as for `main.py fit`, ready for training.

    Raises:
        ConfigError: If it has no images.
    """
    cli = DataCLI(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        args=recipe,
        run=False,
    )
    data = cli.datamodule
    if not isinstance(data, ImageDataModule):
        raise ConfigError(f"data={type(data).__name__} is no source of images.")
    data.prepare_data()
    data.setup("fit")
    return data


def batches_of(data: ImageDataModule, num_images: int) -> tuple[list[Tensor], list[str], Tensor]:
    """Training views of the first images of the first epoch.

    Where there is one view of an image, it is that of several epochs.

    Returns:
        Every view, floats in [0, 1] (n, 3, S, S); what to call each; the same images under the evaluation transform.
    """
    order = list(data.train_dataloader().sampler)[:num_images]
    indices = [index for _, index in order]
    dataset = TransformedDataset(data.train_source, data.train_transform or data.eval_transform, data.seed)
    several = hasattr(data.train_transform, "num_local_views")
    views, names = [], []
    for epoch in range(1 if several else _DRAWS):
        batch = collate([dataset[epoch, index] for index in indices])
        dataset.note(batch.bad)
        images, _ = data.on_after_batch_transfer(data.on_before_batch_transfer(batch.content, 0), 0)
        views += [data.denormalize(view) for view in (images if several else [images])]
    for i, view in enumerate(views):
        kind = "epoch" if not several else "global" if view.shape[-1] == views[0].shape[-1] and i < 2 else "local"
        names.append(f"{kind} {i if kind == 'epoch' else i + 1 if kind == 'global' else i - 1}")
    plain = TransformedDataset(data.train_source, data.eval_transform, data.seed)
    return views, names, torch.stack([plain[0, index].views for index in indices])


def scaled(picture: Tensor, size: int) -> Tensor:
    """A square uint8 (3, S, S) with sides of `size` px: enlarged pixel by pixel, or shrunk smoothly."""
    if picture.shape[-1] <= size:
        return enlarge(picture, size)
    return TF.resize(picture, [size, size], antialias=True)


def contact_sheet(data: ImageDataModule, num_images: int, size: int) -> Tensor:
    """The picture, floats in [0, 1] (3, H, W)."""
    views, names, originals = batches_of(data, num_images)
    side = views[0].shape[-1]
    rows = []
    for i, original in enumerate(originals):
        tiles = [
            Tile(scaled(original, size), "evaluation" if i == 0 else "", f"{original.shape[-1]} px" if i == 0 else "")
        ]
        for view, name in zip(views, names, strict=True):
            picture = (view[i] * 255).round().to(torch.uint8)
            shown = max(
                1, round(size * view.shape[-1] / side)
            )  # local views keep their size relative to the global ones
            caption = (name, f"{view.shape[-1]} px") if i == 0 else ("", "")
            tiles.append(Tile(scaled(picture, shown), *caption))
        rows.append(tiles)
    transform = type(data.train_transform).__name__ if data.train_transform else "the evaluation transform"
    title = f"{type(data).__name__}, {len(data.train_source):,} training images, {transform}, seed {data.seed}"
    return sheet(rows, title).float() / 255


def main(args: list[str] | None = None) -> None:
    """The command; what a user can repair ends with one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vil_lightning.look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="views.png", help="path of the picture")
    parser.add_argument("--images", type=int, default=6, help="number of rows")
    parser.add_argument("--size", type=int, default=128, help="side in px at which a full view is shown")
    own, recipe = parser.parse_known_args(args)
    silence_known_messages()
    try:
        if own.images < 1 or own.size < 8:
            raise ConfigError(f"--images={own.images} must be at least 1, --size={own.size} at least 8.")
        picture = contact_sheet(read_data(recipe), own.images, own.size)
        Path(own.out).parent.mkdir(parents=True, exist_ok=True)
        save_image(picture, own.out)
    except (ValueError, OSError) as error:
        repairable: Any = error if isinstance(error, OSError) else find_repairable(error)
        if repairable is None:
            raise
        print(f"\nerror: {repairable}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {own.out}")


if __name__ == "__main__":
    main()
