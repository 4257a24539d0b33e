"""Multiply-accumulates (MACs) of one forward pass of one image, for any timm model.

    python benchmarks/macs.py vil2_tiny_patch16_224 deit_tiny_patch16_224 [--img_size 224] [--kwargs '{"depth": 12}']

Prints a Markdown table. Counted are matrix products and convolutions, as is usual: norms, activations and biases are not.
torch's counter sees what is executed, which is the right number for most models. Two kinds of layers execute something else
than they define, and are counted by their definition:

- The mLSTM branch of a ViL multiplies its block-diagonal maps as wider tiles, and its cell runs in one of several forms. The
  cell is counted in the parallel form, in which the models are trained: 2 S^2 E for S tokens of inner width E (`full`). Half of
  that lies above the diagonal and is always zero: the lower triangle alone (`causal`) meets the numbers of the paper's
  version 2, half of it again (`half_causal`) those that version 3 is quoted with.
- The mixer of a Vim (selective scan). The scan is not a product but element-wise, 9 L E N operations per direction, and stands
  in a column of its own; the three readings contain it with two operations for one MAC.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vil_lightning  # noqa: F401 - registers the ViL and Vim models with timm
from vil_lightning.backbones.layers import MLSTMBranch
from vil_lightning.backbones.vision_mamba import VimMixer


class Macs(NamedTuple):
    """Cost of one forward pass of one image.

    Args:
        products: MACs of all matrix products and convolutions, attention included, mLSTM cells not.
        cell: MACs of the mLSTM cells in parallel form, with the whole S x S matrix.
        scan_ops: Element-wise operations of selective scans.
    """

    products: float
    cell: float = 0.0
    scan_ops: float = 0.0

    @property
    def full(self) -> float:
        """With the whole S x S matrix of the mLSTM."""
        return self.products + self.cell + self.scan_ops / 2

    @property
    def causal(self) -> float:
        """With its lower triangle: the reading to compare models by."""
        return self.products + self.cell / 2 + self.scan_ops / 2

    @property
    def half_causal(self) -> float:
        """With half of its lower triangle."""
        return self.products + self.cell / 4 + self.scan_ops / 2

    def __add__(self, other: "Macs") -> "Macs":  # type: ignore[override]
        return Macs(*(a + b for a, b in zip(self, other, strict=True)))


def _weight_products(layer: nn.Module, num_tokens: int, skip: tuple[nn.Parameter, ...] = ()) -> int:
    """MACs of linear maps and depthwise convolutions: each of their weights is multiplied once per token."""
    skipped = {id(p) for p in skip}
    return num_tokens * sum(p.numel() for p in layer.parameters() if p.ndim > 1 and id(p) not in skipped)


def _mlstm_branch(layer: MLSTMBranch, x: Tensor) -> Macs:
    batch, seq_len, dim = x.shape
    return Macs(_weight_products(layer, batch * seq_len), cell=2 * batch * seq_len**2 * dim)


def _vim_mixer(layer: VimMixer, x: Tensor) -> Macs:
    batch, seq_len, _ = x.shape
    states = layer.A_log, layer.A_b_log  # (E, N) each
    scan_ops = 9 * batch * seq_len * sum(p.numel() for p in states)
    return Macs(_weight_products(layer, batch * seq_len, skip=states), scan_ops=scan_ops)


# Layers that are counted by their definition.
DEFINED: dict[type[nn.Module], Callable[[Any, Tensor], Macs]] = {MLSTMBranch: _mlstm_branch, VimMixer: _vim_mixer}


@torch.no_grad()
def count_macs(model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3) -> Macs:
    """MACs of one image (in_chans, H, W).

    Args:
        img_size: H = W, or (H, W).
    """
    defined = Macs(0.0)
    replaced = 0  # executed FLOPs inside the layers that are counted by their definition
    entered: list[int] = []
    counter = FlopCounterMode(display=False)

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(counter.get_total_flops())

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal defined, replaced
        replaced += counter.get_total_flops() - entered.pop()
        defined = defined + DEFINED[type(layer)](layer, args[0])

    hooks = []
    for layer in model.modules():
        if type(layer) in DEFINED:
            hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    parameter = next(model.parameters())
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    image = torch.zeros(1, in_chans, *size, dtype=parameter.dtype, device=parameter.device)
    modes = {layer: layer.training for layer in model.modules()}
    model.eval()
    try:
        # Not every fused attention kernel is known to the counter of every torch; two products are.
        with sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in modes.items():
            layer.training = mode
    return defined + Macs((counter.get_total_flops() - replaced) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="timm model names")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--kwargs", type=json.loads, default={}, help="JSON: arguments of all models")
    args = parser.parse_args()
    print(f"GMACs of one forward pass at {args.img_size} px. Models without an mLSTM have only one reading.\n")
    print("| model | M parameters | causal | full | half of causal | G scan operations |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in args.models:
        kwargs = dict(args.kwargs)
        try:
            model = timm.create_model(name, **{"img_size": args.img_size, **kwargs})
        except TypeError:  # convolutional networks take no img_size
            model = timm.create_model(name, **kwargs)
        macs = count_macs(model, args.img_size)
        parameters = sum(p.numel() for p in model.parameters())
        readings = (macs.causal, *((macs.full, macs.half_causal) if macs.cell else (0, 0)), macs.scan_ops)
        cells = [f"{x / 1e9:.{2 if x >= 1e8 else 4}f}" if x else "" for x in readings]
        print(f"| {name} | {parameters / 1e6:.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
