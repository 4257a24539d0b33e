"""What the scans of a Vision-LSTM do with an image: implicit attention, gates, memory.

Letters: `B` batch, `NH` heads, `S` tokens, `DH` head width, `N` patches, `h, w` token grid.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones.layers import Layout, MLSTMBranch
from vil_lightning.backbones.vision_lstm import Scan, ViLMixer
from vil_lightning.ops import mlstm_weights


@dataclasses.dataclass(frozen=True, eq=False)
class ScanRecord:
    """One scan of one block over a batch of images.

    The tensors are in the order of the scan's sequence: row-major, for a scan along columns column-major. What the methods
    return is in the order of the image: patches row-major, class tokens in their places amid them.

    Attributes:
        block: Number of the block, from 0.
        scan: In which order the tokens were visited.
        layout: What the tokens are, in the order of the image.
        q: Queries (B, NH, S, DH).
        k: Keys (B, NH, S, DH).
        igate: Input gate pre-activations (B, NH, S).
        fgate: Forget gate pre-activations (B, NH, S).
    """

    block: int
    scan: Scan
    layout: Layout
    q: Tensor
    k: Tensor
    igate: Tensor
    fgate: Tensor

    def attention(self) -> Tensor:
        """Implicit attention (B, NH, S, S): what a token (row) takes of every token's value (column). See `mlstm_weights`."""
        weights = mlstm_weights(self.q, self.k, self.igate, self.fgate, reverse=self.scan.reverse)
        if not self.scan.columns:
            return weights
        places = self._in_image_order(torch.arange(self.layout.seq_len, device=weights.device))[:, None]  # (B, 1, S)
        weights = weights.gather(2, places[..., :, None].expand_as(weights))
        return weights.gather(3, places[..., None, :].expand_as(weights))

    def order(self) -> Tensor:
        """When the scan came to each token (B, S): 0 for the first one."""
        steps = torch.arange(self.layout.seq_len, device=self.q.device)
        return self._in_image_order(steps.flip(0) if self.scan.reverse else steps)

    def igate_map(self) -> Tensor:
        """Input gate pre-activations (B, NH, h, w): logarithms of the weights with which patches are written. NaN if hidden."""
        return self._map(self.igate)

    def half_life_map(self) -> Tensor:
        """In how many tokens the memory would lose half, if all forget gates were that of this patch: (B, NH, h, w)."""
        return self._map(math.log(2) / F.logsigmoid(self.fgate).abs())

    def half_life(self) -> Tensor:
        """In how many tokens a head's memory loses half, (NH,).

        Forget gates multiply, so what is averaged, over all tokens and images, is their logarithm: exp(n * mean(log f)) of the
        memory is left after n tokens, and one half after n = -ln 2 / mean(log f). (A mean of the tokens' half-lives would say
        something of the few tokens at which hardly anything is forgotten.)
        """
        return math.log(2) / F.logsigmoid(self.fgate).mean((0, 2)).abs()

    def _in_image_order(self, x: Tensor) -> Tensor:
        """Numbers per token of the sequence, (S,) -> (B, S)."""
        x = x.expand(self.q.shape[0], -1)
        return self.layout.transposed.to_columns(x[..., None])[..., 0] if self.scan.columns else x

    def _map(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (B, S, NH)
        if self.scan.columns:
            x = self.layout.transposed.to_columns(x)
        patches, _ = self.layout.split(x)
        image = self.layout.to_grid(patches)
        hidden = self.layout.to_grid(torch.ones_like(patches)) == 0
        return image.masked_fill(hidden, torch.nan).permute(0, 3, 1, 2)


@contextmanager
def record_scans(model: nn.Module) -> Iterator[list[ScanRecord]]:
    """Record every scan that runs in this context, in the order in which they run.

        with record_scans(model) as records:
            model.forward_features(images)
        attention = records[0].attention()

    What a scan reads is computed a second time, without gradients; the model's own computation is not touched and nothing is
    left behind in it. A compiled model runs uncompiled meanwhile: it would pass the hooks by.

    Args:
        model: A `VisionLSTM`, or a module with one or more inside it.

    Raises:
        ValueError: If the model has no mLSTM scans.
    """
    mixers = [module for module in model.modules() if isinstance(module, ViLMixer)]
    if not mixers:
        raise ValueError(
            f"record_scans: {type(model).__name__} has no mLSTM scans. Available for Vision-LSTM: vil_… and vil2_… models."
        )
    records: list[ScanRecord] = []
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for block, mixer in enumerate(mixers):
            _watch(stack, records, block, mixer)
        yield records


def _watch(stack: ExitStack, records: list[ScanRecord], block: int, mixer: ViLMixer) -> None:
    # A branch that several scans share is not told which of them it runs for; the mixer makes those along rows first.
    in_turn = sorted(mixer.scans, key=lambda scan: scan.columns)
    to_come: list[Scan] = []

    def start(mixer: nn.Module, args: Any) -> None:
        to_come[:] = in_turn

    def record(branch: MLSTMBranch, args: tuple[Tensor, Layout, bool]) -> None:
        x, layout, reverse = args
        scan = to_come.pop(0)
        assert scan.reverse == reverse
        with torch.no_grad():
            q, k, _, igate, fgate, _ = branch.project(x, layout, reverse)
        layout = layout.transposed if scan.columns else layout
        records.append(ScanRecord(block, scan, layout, q, k, igate, fgate))

    stack.callback(mixer.register_forward_pre_hook(start).remove)
    for branch in mixer.branches:
        stack.callback(branch.register_forward_pre_hook(record).remove)


def between_patches(weights: Tensor, layout: Layout) -> Tensor:
    """Weights between all tokens (..., S, S), in the order of the image -> between patches alone (..., N, N)."""
    patches, _ = layout.split(torch.arange(layout.seq_len, device=weights.device)[None, :, None])
    places = patches[0, :, 0]
    return weights[..., places[:, None], places]


def rollout(records: Sequence[ScanRecord]) -> Tensor:
    """Attention rollout: through all blocks, how much of each patch (column) reaches each patch (row), (B, N, N).

    A block passes a token on by its residual path and mixes tokens in its scans: it is taken as half the identity and half the
    mean of its scans' and heads' implicit attention, with absolute values and rows that sum to 1 (the norm after the mLSTM
    takes the scale of a head's row away). The blocks' matrices are multiplied. Rows of the product sum to 1, less what is of
    class tokens.

    This is a heuristic. Signs are dropped, although weights of opposite sign cancel; the two paths count alike, whatever their
    sizes are; convolutions, gates, skips and values do not enter. A scan's first patches have few to read but themselves, so
    the corners where scans start gain weight with depth, in an untrained network, too: compare with one.

    Args:
        records: Of one forward pass, of all blocks or of some.

    Raises:
        ValueError: If there are no records, or those of several passes.

    References:
        Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv:2005.00928.
    """
    passes = [(record.block, record.scan) for record in records]
    if not records or len(set(passes)) < len(passes):
        raise ValueError(
            f"rollout: expected the records of one forward pass, got {len(records)} of {len(set(passes))} scans."
        )
    total: Tensor | None = None
    for _, scans in itertools.groupby(records, key=lambda record: record.block):
        # One block's matrices at a time: those of all blocks would take blocks * heads * S² memory.
        mixing = torch.stack([_shares(record.attention()).mean(1) for record in scans]).mean(0)  # (B, S, S)
        identity = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
        step = (identity + mixing) / 2
        total = step if total is None else step @ total
    assert total is not None
    return between_patches(total, records[0].layout)


def _shares(weights: Tensor) -> Tensor:
    """Absolute values, in rows that sum to 1."""
    weights = weights.abs()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
