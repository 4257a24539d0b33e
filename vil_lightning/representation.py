"""What a set of feature vectors looks like: its rank, its spread, its principal directions, its linear separability.

Plain functions of tensors. They compute in the dtype of their input, in float32 at least.

Letters: `N` vectors, `D` their width, `C` classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank of features (N, D), between 1 and min(N, D): exp of the entropy of the normalised singular values.

    The features are not centred, as in the paper: a large common mean counts as a direction, and as hardly more than one.

    References:
        Garrido et al. 2023, arXiv:2210.02885, equations 1 and 2; `eps` is theirs.
    """
    singular_values = torch.linalg.svdvals(_at_least_float32(features))
    # Only zeros have no sum; their rank is taken as that of equal vectors, 1.
    shares = singular_values / singular_values.sum().clamp(min=torch.finfo(singular_values.dtype).tiny) + eps
    return (-(shares * shares.log()).sum()).exp()


def feature_std(features: Tensor) -> Tensor:
    """Deviation of unit-length features (N, D), averaged over channels, relative to 1 / sqrt(D): 1 for a uniform cloud."""
    unit = F.normalize(_at_least_float32(features), dim=1)
    return unit.std(0).mean() * math.sqrt(unit.shape[1])


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean distance, to the power `alpha`, between unit-length features (N, D) of two views of the same images; best is 0.

    References:
        Wang and Isola 2020, arXiv:2005.10242, section 4.1.
    """
    x, y = F.normalize(_at_least_float32(x), dim=1), F.normalize(_at_least_float32(y), dim=1)
    return (x - y).norm(dim=1).pow(alpha).mean()


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """Log of the mean Gaussian potential exp(-t d²) over all pairs of unit-length features (N, D), N at least 2.

    0 where all features are one; about -2 t on a wide uniform sphere (d² = 2), which is best.

    References:
        Wang and Isola 2020, arXiv:2005.10242, section 4.1.
    """
    x = F.normalize(_at_least_float32(x), dim=1)
    squared_distances = (2 - 2 * x @ x.T).clamp(min=0)  # (N, N)
    potentials = (-t * squared_distances).exp().fill_diagonal_(0)  # no vector is its own pair
    return (potentials.sum() / (len(x) * (len(x) - 1))).log()


def principal_components(tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The directions along which vectors (N, D) vary most.

    An eigenvector has no sign of its own: here, its largest entry is positive.

    Returns:
        Mean (D,), and a basis (D, k) of unit vectors in the order of falling variance.
    """
    if not 1 <= k <= min(tokens.shape):
        raise ValueError(
            f"principal_components: k={k} must be between 1 and {min(tokens.shape)}, the smaller side of the tokens."
        )
    tokens = _at_least_float32(tokens)
    mean = tokens.mean(0)
    _, _, directions = torch.linalg.svd(tokens - mean, full_matrices=False)
    basis = directions[:k].T
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # (1, k)
    return mean, basis * largest.sign()


def logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float, max_iter: int, chunk_size: int = 8192
) -> tuple[Tensor, Tensor, float]:
    """A linear classifier of fixed features, fitted by full-batch L-BFGS from zeros: no randomness, nothing to tune.

    Minimises cross-entropy (mean over the images) + weight_decay / 2 * |weight|².

    Args:
        features: (N, D); should have about unit deviation per channel.
        labels: (N,).
        max_iter: Iterations of L-BFGS at most.
        chunk_size: Images whose scores are held at once.

    Returns:
        Weight (C, D), bias (C,), and the cross-entropy reached.
    """
    features = _at_least_float32(features.detach())
    weight = features.new_zeros(num_classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * weight_decay * weight.square().sum()
        total.backward()
        total = total.detach()
        for x, y in zip(features.split(chunk_size), labels.split(chunk_size), strict=True):
            part = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum") / len(features)
            part.backward()
            total = total + part.detach()
        return total

    with torch.enable_grad():  # the graphs are those of the two parameters alone
        optimizer.step(objective)
        loss = objective() - 0.5 * weight_decay * weight.detach().square().sum()
    return weight.detach(), bias.detach(), float(loss)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
