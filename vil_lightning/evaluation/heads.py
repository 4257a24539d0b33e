"""Linear classifiers of one read-out that are trained side by side, each with a learning rate and a weight decay of its own.

Letters: `H` heads, `C` classes, `D` width of the features, `B` images of a batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.inputs import chunks

_LOGITS_AT_ONCE = 2**24  # 64 MiB in float32


class Heads:
    """H classifiers in one weight (H, C, D) and one bias (H, C), so that all their scores are one matrix product.

    Weights start from N(0, 0.01), the same for all heads, biases from 0. Float32.

    Args:
        width: D.
        num_classes: C.
        lrs: Peak learning rates, one per head.
        weight_decays: L2 penalties of the weights, one per head.
        optimizer: `sgd` with momentum 0.9, or `lars`, which takes one head: its trust ratio is that of a whole weight.
        batch_norm: Normalise features by batch norm without gain and shift.
        statistics: Or with a fixed mean and deviation (D,).
        seed: Of the weights.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        *,
        optimizer: Literal["sgd", "lars"] = "sgd",
        batch_norm: bool = False,
        statistics: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        start = 0.01 * torch.randn(num_classes, width, generator=generator)
        self.weight = start.to(self.device).repeat(len(lrs), 1, 1).requires_grad_()
        self.bias = torch.zeros(len(lrs), num_classes, device=self.device, requires_grad=True)
        self.norm: nn.Module = nn.Identity()
        if batch_norm:
            self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6, device=self.device)
        mean, std = statistics if statistics is not None else (torch.zeros(width), torch.ones(width))
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.optimizer: _Sgd | _Lars
        if optimizer == "lars":
            assert len(lrs) == 1
            self.optimizer = _Lars(self.weight, self.bias, lrs[0], weight_decays[0])
        else:
            self.optimizer = _Sgd(self.weight, self.bias, lrs, weight_decays)

    def scores(self, features: Tensor) -> Tensor:
        """(B, H, C) of features (B, D)."""
        x = self.norm((features.to(self.device).float() - self.mean) / self.std)
        heads, classes, _ = self.weight.shape
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).view(-1, heads, classes)

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step of every head on the mean cross-entropy of a batch, at `factor` times its peak learning rate."""
        if isinstance(self.norm, nn.BatchNorm1d) and len(features) < 2:
            raise ConfigError("probe: batch norm needs batches of at least 2 training images.")
        self.norm.train()
        with torch.enable_grad():
            # A sum over heads: they share no parameters, so this trains each on its own loss.
            self._cross_entropy(self.scores(features), labels).mean(0).sum().backward()
        self.optimizer.step(factor)
        self.weight.grad = self.bias.grad = None

    @torch.no_grad()
    def evaluate(
        self, features: Tensor, labels: Tensor, rows: Tensor | None
    ) -> tuple[list[float], list[float], Tensor]:
        """Accuracy in percent and mean cross-entropy of each head, and which images it classifies correctly, bool (H, M).

        The cross-entropy of a head that diverged is infinite.
        """
        self.norm.eval()
        heads, classes, _ = self.weight.shape
        hits, loss = [], torch.zeros(heads, dtype=torch.float64)
        for part, x in chunks(features, rows, max(1, _LOGITS_AT_ONCE // (heads * classes))):
            scores = self.scores(x)
            loss += self._cross_entropy(scores, labels[part]).double().sum(0).cpu()
            hits.append((scores.argmax(-1) == labels[part].to(self.device)[:, None]).cpu())
        correct = torch.cat(hits).T
        mean_loss = (loss / correct.shape[1]).nan_to_num(nan=float("inf"))
        return (100 * correct.double().mean(1)).tolist(), mean_loss.tolist(), correct

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(B, H) of scores (B, H, C) and labels (B,)."""
        labels = labels.to(self.device)[:, None].expand(scores.shape[:2])
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(scores.shape[:2])


class _Sgd:
    """`torch.optim.SGD` with momentum 0.9, where each head, the first dimension, has a learning rate and decay of its own."""

    def __init__(self, weight: Tensor, bias: Tensor, lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        self.weight, self.bias = weight, bias
        self.lrs = torch.tensor(lrs, device=weight.device)
        self.weight_decays = torch.tensor(weight_decays, device=weight.device)
        self.momenta = torch.zeros_like(weight), torch.zeros_like(bias)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rates."""
        assert self.weight.grad is not None
        assert self.bias.grad is not None
        lrs = factor * self.lrs
        self.momenta[0].mul_(0.9).add_(self.weight.grad).addcmul_(self.weight, self.weight_decays[:, None, None])
        self.momenta[1].mul_(0.9).add_(self.bias.grad)
        self.weight.addcmul_(self.momenta[0], lrs[:, None, None], value=-1)
        self.bias.addcmul_(self.momenta[1], lrs[:, None], value=-1)


class _Lars:
    """Timm's LARS for one head: the trust ratio scales the weight's gradient, with or without decay, not the bias's."""

    def __init__(self, weight: Tensor, bias: Tensor, lr: float, weight_decay: float) -> None:
        groups = [{"params": [weight], "weight_decay": weight_decay, "always_adapt": True}, {"params": [bias]}]
        self.lr = lr
        self.optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)

    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.lr
        self.optimizer.step()
