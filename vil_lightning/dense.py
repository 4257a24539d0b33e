"""Scores of dense predictions, and how an image of any size is predicted: no network in particular, no loop.

Letters: `B` images, `C` classes, `D` width of the features, `H, W` pixels, `h, w` patch grid.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

IGNORED = -1  # the label of pixels that are neither trained on nor scored

# --- an image of any size ---------------------------------------------------------------------------------------------


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` px, the last one flush with the end. A short side has one, at 0."""
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


def slide(network: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int) -> Tensor:
    """Logits of whole images, averaged over the windows that see a pixel.

    Args:
        network: Images (B, 3, h, w) to logits (B, C, h, w).
        images: (B, 3, H, W), of any size.
        window: Side of the windows in px; where an image is smaller, they end with it.
        stride: Distance of neighbouring windows in px, at most `window`.

    Returns:
        (B, C, H, W), float32.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"slide: stride={stride} must be between 1 and window={window}, or pixels would be left out.")
    height, width = images.shape[-2:]
    total, count = torch.zeros(()), torch.zeros(height, width, device=images.device)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = network(images[place]).float()
            if not total.ndim:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[place] += logits
            count[place] += 1
    return total / count


def padded_to_multiple(images: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Images with zeros (the mean colour) at the bottom and on the right, so that whole patches cover them."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple[1], 0, -height % multiple[0]))


# --- scores -----------------------------------------------------------------------------------------------------------


class Confusion(Metric):
    """How often pixels of each class (rows) are predicted as each class (columns), over all images and processes.

    torchmetrics' own confusion matrix makes a table (pixels, C²) while torch's deterministic algorithms are on: 47 GB for
    one image of 512 px and 150 classes.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Classes of any, equal shape; labels that are `IGNORED` do not count."""
        seen = labels != IGNORED
        pairs = labels[seen].long() * self.num_classes + predicted[seen].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, -1)

    def compute(self) -> Tensor:
        """(C, C)."""
        return self.counts


def scores_of(confusion: Tensor) -> dict[str, Tensor]:
    """What a confusion matrix (C, C), true classes in rows, says, in percent.

    Returns:
        `iou` (C,), NaN for a class that is neither there nor predicted; `miou`, its mean over the others; `pixel_acc`, the
        share of pixels that are right; `mean_acc`, the mean of this share over the classes that are there.
    """
    confusion = confusion.double()
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = 100 * right / (true + predicted - right)  # 0 / 0 is NaN
    return {
        "iou": iou,
        "miou": iou.nanmean(),
        "pixel_acc": 100 * right.sum() / true.sum(),
        "mean_acc": 100 * (right / true).nanmean(),
    }


# --- without a trained head -------------------------------------------------------------------------------------------


def pca_foreground(
    patch_maps: Callable[[Tensor], Tensor],
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    background: int,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    """How well the first principal component of patch features separates foreground from background; nothing is trained.

    The component is that of all patches of all images together. Its scores are enlarged to the size of the mask (bilinear)
    and cut at zero, the mean patch. A component has no sign, so either side may be the foreground: both are reported.
    The better of the two knows one bit of the labels, and is to be compared with `everything`, the intersection over union
    of calling all pixels foreground. A network whose features vary more with something else (position, brightness) scores
    low here although the foreground may be easy to read off by a trained head.

    Args:
        patch_maps: Images (B, 3, H, W) to features (B, D, h, w).
        batches: Called twice, must give the same each time: images and masks (B, H, W); `IGNORED` pixels do not count.
        background: The class that is background; all others are foreground.
        reduce: Sum over processes, each of which has images of its own.

    Returns:
        `positive` and `negative`: intersection over union of the foreground in percent, for scores above and below zero; the
        positive direction is that of the component's largest entry. `best` of the two, and `everything`.
    """
    mean, direction = _first_component(patch_maps, batches, reduce)
    counts = torch.zeros(
        3, 2, dtype=torch.float64, device=mean.device
    )  # intersections, unions of the three predictions
    for images, masks in batches():
        scores = torch.einsum("bdhw,d->bhw", patch_maps(images).double() - mean.view(-1, 1, 1), direction)
        scores = F.interpolate(scores[:, None], size=masks.shape[-2:], mode="bilinear")[:, 0]
        seen, foreground = masks != IGNORED, masks != background
        for row, chosen in zip(counts, (scores > 0, scores < 0, torch.ones_like(seen)), strict=True):
            row += torch.stack([(chosen & foreground & seen).sum(), ((chosen | foreground) & seen).sum()])
    intersections, unions = reduce(counts).unbind(1)
    positive, negative, everything = (100 * intersections / unions).tolist()
    return {"positive": positive, "negative": negative, "best": max(positive, negative), "everything": everything}


def _first_component(
    patch_maps: Callable[[Tensor], Tensor],
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean (D,) and direction (D,) of the largest variance of all patches, float64, of sums that need no patch to be kept."""
    moments: Tensor | None = None
    for images, _ in batches():
        tokens = patch_maps(images).double().transpose(0, 1).flatten(1)  # (D, n)
        tokens = torch.cat([tokens, torch.ones_like(tokens[:1])])  # so that one product holds number, sums and squares
        moments = tokens @ tokens.T if moments is None else moments + tokens @ tokens.T
    if moments is None:
        raise ValueError("pca_foreground: there are no images.")
    moments = reduce(moments)
    mean = moments[:-1, -1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / moments[-1, -1] - torch.outer(mean, mean)
    direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    return mean, direction * direction[direction.abs().argmax()].sign()
