"""Vision-LSTM computed the way the published code computes it, to be timed against.

The same numbers from the same parameters, by other means: reversed scans flip the sequence before a block and back after it,
the block-diagonal q, k and v are an einsum over blocks of 4, the gates read a concatenation 3 E wide, and the mLSTM builds
several (S + 1) x (S + 1) matrices a head. Written from the formulas of the papers (arXiv:2406.04303, arXiv:2405.04517).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.backbones.layers import BlockDiagonalLinear, Layout, MLSTMBranch, MultiHeadNorm
from vil_lightning.backbones.vision_lstm import ViLBlock, ViLMixer, VisionLSTM


def as_published(model: VisionLSTM) -> VisionLSTM:
    """Let a model of the published designs compute as the published code does; in place, with the parameters it has.

    Raises:
        ValueError: For a design that was not published: other scans than alternating rows, or class tokens.
    """
    for block in cast("list[ViLBlock]", model.blocks):
        mixer = block.mixer
        if len(mixer.scans) != 1 or mixer.scans[0].columns or any(model.cls_layout):
            raise ValueError("as_published: only block_design='alternating' without class tokens was published.")
        block.mixer = PublishedMixer(mixer)  # type: ignore[assignment]
    return model


class PublishedMixer(nn.Module):
    """A `ViLMixer` of one scan, with its parameters."""

    def __init__(self, mixer: ViLMixer) -> None:
        super().__init__()
        self.reverse = mixer.scans[0].reverse
        self.proj_up = mixer.proj_up
        self.branch = mixer.branches[0]
        self.proj_down = mixer.proj_down

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        if self.reverse:
            x = x.flip(1)
        x, gate = self.proj_up(x).chunk(2, dim=-1)
        y = self.scan(x, layout) * F.silu(gate)
        y = self.proj_down(y)
        return y.flip(1) if self.reverse else y

    def scan(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, S, E) -> (B, S, E), from the first token to the last."""
        branch: MLSTMBranch = self.branch  # type: ignore[assignment]
        c = F.silu(branch.conv(x, layout, False))
        q, k, v = (block_diagonal(proj, y) for proj, y in ((branch.q_proj, c), (branch.k_proj, c), (branch.v_proj, x)))
        gate_input = torch.cat([q, k, v], dim=-1)
        igate, fgate = (gate(gate_input).transpose(1, 2) for gate in (branch.igate, branch.fgate))
        q, k, v = (t.unflatten(-1, (branch.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = published_mlstm(q, k, v, igate, fgate)
        return multi_head_norm(branch.norm, h) + branch.skip * c


def block_diagonal(proj: BlockDiagonalLinear, x: Tensor) -> Tensor:
    """(..., dim) -> (..., dim)."""
    num_blocks, _, block_size = proj.weight.shape
    y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (num_blocks, block_size)), proj.weight).flatten(-2)
    return y if proj.bias is None else y + proj.bias


def multi_head_norm(norm: MultiHeadNorm, x: Tensor) -> Tensor:
    """(B, NH, S, DH) -> (B, S, NH * DH), as a group norm over single tokens."""
    batch, heads, seq_len, head_dim = x.shape
    x = x.transpose(1, 2).reshape(batch * seq_len, heads * head_dim)
    x = F.group_norm(x, heads, norm.weight, norm.bias, norm.eps)
    return x.view(batch, seq_len, heads * head_dim)


def published_mlstm(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, eps: float = 1e-6) -> Tensor:
    """As `vil_lightning.ops.mlstm` with `reverse=False`: arguments, result and formula."""
    seq_len, head_dim = q.shape[2:]
    decay_sum = F.pad(F.logsigmoid(fgate).cumsum(-1), (1, 0))  # F_0 = 0 ... F_S
    rows = decay_sum[..., None].repeat(1, 1, 1, seq_len + 1)  # (B, NH, S + 1, S + 1)
    differences = rows - rows.transpose(-1, -2)
    seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).tril()
    log_decay = torch.where(seen, differences[..., 1:, 1:], -math.inf) + igate[..., None, :]
    row_max = log_decay.amax(-1, keepdim=True)
    decay = torch.exp(log_decay - row_max)
    scores = (q @ (k / math.sqrt(head_dim)).transpose(-1, -2)) * decay
    normalizer = torch.maximum(scores.sum(-1, keepdim=True).abs(), torch.exp(-row_max))
    return (scores / (normalizer + eps)) @ v
