"""Where the forward pass of a ViL block goes on a CPU, and how long its matrix products take by themselves.

python benchmarks/block_parts.py --out benchmarks/results/block_parts.md

The clocks run around the parts of the network as it computes. "Products alone" repeats the products of a part with operands of
the same shapes, which stay in the caches: what would remain if all that lies between them cost nothing.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import vil_lightning.backbones.layers as layers
from vil_lightning.allocator import keep_freed_memory
from vil_lightning.evaluation.report import circumstances

Clocks = dict[str, list[float]]
PARTS = ("up and down projection", "mLSTM", "q, k, v", "head norm, bias and skip", "gates", "convolution")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vil2_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept = keep_freed_memory()
    model = timm.create_model(options.model, img_size=options.img_size).eval()
    images = torch.randn(options.batch, 3, options.img_size, options.img_size)
    clocks: Clocks = defaultdict(list)
    with torch.no_grad():
        model(images)
        passes = [_seconds(lambda: model(images)) for _ in range(options.rounds)]
        alone = {part: sum(map(_median, products)) for part, products in _products(model, images).items()}
        _put_clocks(model, clocks)
        model(images)
        clocks.clear()
        for _ in range(options.rounds):
            model(images)
    depth = len(model.blocks)
    measured = {part: sum(clocks[part]) / options.rounds / depth for part in (*PARTS, "block")}
    measured["the rest"] = 2 * measured["block"] - sum(measured.values())
    facts = circumstances()
    lines = [
        f"# Parts of a block: {options.model}, {options.batch} images of {options.img_size} px, forward, float32, eager",
        "",
        f"- date: {facts['date']}; hardware: {facts['hardware']}, {torch.get_num_threads()} torch threads",
        f"- torch {torch.__version__}; memory that is freed: {'kept' if kept else 'given back'}",
        f"- command: `python benchmarks/block_parts.py --model {options.model} --batch {options.batch} "
        f"--img_size {options.img_size} --rounds {options.rounds}`",
        f"- a pass without clocks: median {1e3 * statistics.median(passes):.0f} ms ({1e3 * min(passes):.0f} to "
        f"{1e3 * max(passes):.0f}), {depth} blocks; means over {options.rounds} passes and all blocks",
        "",
        "| µs a block | in the network | products alone |",
        "|---|---:|---:|",
    ]
    for part in (*PARTS, "the rest"):
        lines.append(
            f"| {part} | {1e6 * measured[part]:,.0f} | {f'{1e6 * alone[part]:,.0f}' if part in alone else ''} |"
        )
    lines.append(f"| **sum** | **{1e6 * measured['block']:,.0f}** | **{1e6 * sum(alone.values()):,.0f}** |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _median(call: Callable[[], object]) -> float:
    call()
    return statistics.median(_seconds(call) for _ in range(30))


def _put_clocks(model: Any, clocks: Clocks) -> None:
    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            clocks[part].append(time.perf_counter() - start)
            return result

        return run

    layers.mlstm = clocked(layers.mlstm, "mLSTM")
    for block in model.blocks:
        (branch,) = block.mixer.branches
        branch._gates = clocked(branch._gates, "gates")
        parts = {
            "up and down projection": (block.mixer.proj_up, block.mixer.proj_down),
            "q, k, v": (branch.q_proj, branch.k_proj, branch.v_proj),
            "head norm, bias and skip": (branch.norm,),
            "convolution": (branch.conv,),
            "block": (block,),
        }
        for part, modules in parts.items():
            for module in modules:
                module.forward = clocked(module.forward, part)


def _products(model: Any, images: torch.Tensor) -> dict[str, list[Callable[[], object]]]:
    """The products of a block with chunks of even length, `chunkwise`."""
    mixer = model.blocks[0].mixer
    branch = mixer.branches[0]
    inner, heads = mixer.proj_down.in_features, branch.num_heads
    seq_len, width = model.patch_embed.num_patches, inner // heads
    tokens = len(images) * seq_len
    chunks = -(-seq_len // 64)
    length, count = -(-seq_len // chunks), len(images) * heads * chunks
    x, y = torch.randn(tokens, mixer.proj_up.in_features), torch.randn(tokens, inner)
    q, k, v = torch.randn(3, count, length, width)
    scores, memory = torch.randn(count, length, length), torch.randn(count, width, width)
    tile = branch.q_proj.tile_size
    tiled, tiles = torch.randn(inner // tile, tokens, tile), torch.randn(inner // tile, tile, tile)
    gate = torch.randn(2 * heads, inner)
    return {
        "up and down projection": [lambda: mixer.proj_up(x), lambda: mixer.proj_down(y)],
        "mLSTM": [
            lambda: torch.bmm(q, k.mT),
            lambda: torch.bmm(scores, v),
            lambda: torch.bmm(k.mT, v),
            lambda: torch.bmm(q, memory),
        ],
        "q, k, v": 3 * [lambda: torch.bmm(tiled, tiles)],
        "gates": 2 * [lambda: torch.nn.functional.linear(y, gate)],
    }


if __name__ == "__main__":
    main()
