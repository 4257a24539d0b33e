"""What the built-in digits' features are worth after every block of a network: kNN and 5-shot accuracy of averaged tokens.

    python benchmarks/depth.py LABEL=CHECKPOINT ... [--out benchmarks/results/NAME.md]

An untrained network of the first checkpoint's kind is put above them. A method that rebuilds pixels from the last tokens may
have its best features earlier: the last blocks then belong to the decoder.
"""

import argparse
import datetime
import shlex
import sys
from pathlib import Path

import torch
from digits_dino import scores  # type: ignore[import-not-found]
from mlstm_backends import hardware  # type: ignore[import-not-found]
from torch import Tensor, nn

from vil_lightning.data import Digits
from vil_lightning.methods.backbone import BackboneConfig, build_backbone, resolve_backbone


class UpTo(nn.Module):
    """Averaged tokens (B, D) after block `index`, without the final norm."""

    def __init__(self, backbone: nn.Module, index: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.index = index

    def forward(self, images: Tensor) -> Tensor:
        (grid,) = self.backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.index], intermediates_only=True, norm=False
        )
        return grid.mean(dim=(2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=CHECKPOINT")
    parser.add_argument("--out", help="file for the table; printed in any case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [checkpoint.partition("=")[::2] for checkpoint in args.checkpoints]
    first = resolve_backbone(BackboneConfig(None, pairs[0][1]))
    configs = {"untrained": BackboneConfig(first.name, None, first.kwargs)}
    configs |= {label: resolve_backbone(BackboneConfig(None, path)) for label, path in pairs}
    data = Digits(img_size=first.kwargs["img_size"], seed=0)
    data.setup()

    depth = 0
    rows = []
    for label, config in configs.items():
        torch.manual_seed(0)
        backbone = build_backbone(config).eval()
        depth = len(backbone.blocks)  # type: ignore[arg-type]
        cells = [scores(UpTo(backbone, index), data) for index in range(depth)]
        rows.append(f"| {label} | " + " | ".join(f"{knn:.1f} / {five_shot:.1f}" for knn, five_shot in cells) + " |")
    lines = ["# Features of the built-in digits by depth", ""]
    lines += [f"- date: {datetime.date.today()}", f"- hardware: {hardware('cpu')}"]
    lines.append(f"- command: `python {shlex.join(sys.argv)}`")
    lines += ["- kNN (k = 20) / 5-shot accuracy in percent of averaged tokens after each scan, last state", ""]
    lines.append("| network | " + " | ".join(f"after scan {i + 1}" for i in range(depth)) + " |")
    table = "\n".join([*lines, "|---|" + "---:|" * depth, *rows]) + "\n"
    print(table)
    if args.out:
        Path(args.out).write_text(table)


if __name__ == "__main__":
    main()
