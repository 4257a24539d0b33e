"""Which patches of an image are hidden from the network.

Masks are (B, N) booleans, True = hidden, for the N = h * w patches in row-major order. Every image of a batch has equally many
hidden patches, so that the visible ones fit one tensor.
"""

import math

import torch
from torch import Tensor

MASK_KINDS = ("random", "block", "row")


def hidden_mask(
    kind: str, batch_size: int, grid_size: tuple[int, int], mask_ratio: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw a mask from torch's generator.

    Args:
        kind: `random` hides patches independently (MAE); `block` hides rectangles of aspect ratio 0.3 to 3.3 (BEiT); `row`
            hides whole rows, so that a scan along rows loses stretches instead of single patches.
        grid_size: (h, w).
        mask_ratio: Share of hidden patches; what `num_hidden` makes of it is exact.

    Returns:
        (B, h * w) on `device`.
    """
    if kind == "random":
        return _largest(
            torch.rand(batch_size, math.prod(grid_size), device=device), num_hidden(kind, grid_size, mask_ratio)
        )
    if kind == "row":
        rows = _largest(torch.rand(batch_size, grid_size[0], device=device), round(mask_ratio * grid_size[0]))
        return rows.repeat_interleave(grid_size[1], dim=1)
    if kind == "block":
        masks = [_blocks(grid_size, num_hidden(kind, grid_size, mask_ratio)) for _ in range(batch_size)]
        return torch.stack(masks).to(device, non_blocking=True)
    raise ValueError(f"mask kind {kind!r} is not known. Available: {', '.join(MASK_KINDS)}.")


def num_hidden(kind: str, grid_size: tuple[int, int], mask_ratio: float) -> int:
    """How many patches of an image are hidden. The visible ones are rounded down, as in MAE (49 of 196 at 0.75)."""
    h, w = grid_size
    if kind == "row":
        return round(mask_ratio * h) * w
    return h * w - int(h * w * (1 - mask_ratio) + 1e-9)  # 100 * (1 - 0.9) is 9.999999999999998


def visible_positions(hidden: Tensor, num_visible: int) -> Tensor:
    """Positions (B, K) of the visible patches in increasing order: a scan has to meet them in the order of the image."""
    return hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]


def hidden_except(visible: Tensor, num_patches: int) -> Tensor:
    """The mask (B, N) of all patches but the `visible` ones (B, K)."""
    mask = torch.ones(len(visible), num_patches, dtype=torch.bool, device=visible.device)
    return mask.scatter(1, visible, False)


def hidden_places(hidden: Tensor) -> Tensor:
    """Positions (M,) of the M hidden patches of a batch (B, N) in its B * N patches, in increasing order.

    M depends on the mask: keep it on the CPU, or this waits for the device.
    """
    return hidden.flatten().nonzero().squeeze(1)


def uneven_block_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    mask_prob: float,
    mask_ratio: tuple[float, float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a mask of which images have unequal shares: rectangles in some images, nothing in the others (iBOT, DINOv2).

    Args:
        grid_size: (h, w).
        mask_prob: Share of the images that are masked; which ones is random, how many is not.
        mask_ratio: Smallest and largest share of hidden patches in a masked image. The masked images of a batch divide this
            range evenly among them, so that a batch hides about equally many patches every time (DINOv2).

    Returns:
        (B, h * w) on `device`.
    """
    num_masked = round(mask_prob * batch_size)
    low, high = mask_ratio
    shares = (torch.arange(num_masked) + torch.rand(num_masked)) / max(num_masked, 1)
    counts = ((low + shares * (high - low)) * math.prod(grid_size)).round().long().clamp(min=1).tolist()
    masks = torch.zeros(batch_size, math.prod(grid_size), dtype=torch.bool)
    for image, count in zip(torch.randperm(batch_size).tolist(), counts, strict=False):
        masks[image] = _blocks(grid_size, count)
    return masks.to(device, non_blocking=True)


def _largest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of each row."""
    places = scores.argsort(dim=1, descending=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, places, True)


def _blocks(grid_size: tuple[int, int], count: int) -> Tensor:
    """Rectangles one after another until exactly `count` patches (of which the last rectangle may lack some) are hidden."""
    h, w = grid_size
    hidden = torch.zeros(h, w, dtype=torch.bool)
    while (left := count - int(hidden.sum())) > 0:
        draw = torch.rand(4).tolist()
        area = min(4, left) + draw[0] * (left - min(4, left))
        aspect = 0.3 * (1 / 0.09) ** draw[1]  # log-uniform between 0.3 and 1 / 0.3
        height = min(max(round(math.sqrt(area * aspect)), 1), h)
        width = min(max(round(math.sqrt(area / aspect)), 1), w)
        top, start = int(draw[2] * (h - height + 1)), int(draw[3] * (w - width + 1))
        new = torch.zeros_like(hidden)
        new[top : top + height, start : start + width] = True
        places = (new & ~hidden).flatten().nonzero().squeeze(1)[:left]
        hidden.view(-1)[places] = True
    return hidden.flatten()
