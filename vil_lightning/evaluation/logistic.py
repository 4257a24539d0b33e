"""Multinomial logistic regression of fixed features: convex, so there is one answer and no learning rate.

Fitted by torch's L-BFGS, whose closure adds the gradient up over chunks of images: scikit-learn's solver wants all features in
memory as float32 or float64 (7.9 GB for 1.28 M x 1,536, and as much again once they are standardised), here they may be
memory-mapped and bfloat16, and a GPU helps. The problem is scikit-learn's, with the same `C`:

    C * (sum of the images' cross-entropies) + 1/2 |weight|²,  the bias free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.inputs import channel_statistics, check_features, check_labels, chunks, split_held_out
from vil_lightning.evaluation.scores import Score, accuracy_score

CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of features x (N, D) are ((x - mean) / std) @ weight.T + bias.

    Args:
        weight: (C, D).
        bias: (C,).
        mean: (D,).
        std: (D,).
        cross_entropy: Mean over the images it was fitted to.
        converged: Whether L-BFGS stopped before its last iteration.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    cross_entropy: float
    converged: bool

    @torch.no_grad()
    def evaluate(
        self,
        features: Tensor,
        labels: Tensor,
        rows: Tensor | None = None,
        chunk_size: int = 8192,
        classes: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """Which images are classified correctly, bool (M,) on the CPU, and their mean cross-entropy.

        Args:
            classes: The ones that are possible; None for all.
        """
        correct, loss = [], 0.0
        for part, x in chunks(features, rows, chunk_size):
            y = labels[part].to(self.weight.device)
            scores = among(_scores(x, self.weight, self.bias, self.mean, self.std), classes)
            correct.append((scores.argmax(1) == y).cpu())
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
        hits = torch.cat(correct)
        return hits, loss / len(hits)


def among(scores: Tensor, classes: Tensor | None) -> Tensor:
    """Scores (N, C), -inf for those that are not among `classes`; None for all."""
    if classes is None:
        return scores
    impossible = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    impossible[classes.to(scores.device)] = False
    return scores.masked_fill(impossible, -torch.inf)


@dataclass(frozen=True)
class LogisticResult:
    """What `logistic_regression` found.

    Args:
        score: On val.
        C: The chosen one.
        held_out: Accuracy in percent on the held-out images, by C.
        at_edge: Whether the chosen C is the smallest or largest of several: a wider range might be better.
        classifier: Fitted to all training images.
    """

    score: Score
    C: float
    held_out: dict[float, float]
    at_edge: bool
    classifier: LinearClassifier
    num_train: int
    num_held_out: int


def logistic_regression(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int | None = None,
    Cs: Sequence[float] = CS,
    held_out: float = 0.1,
    seed: int = 0,
    max_iter: int = 1000,
    chunk_size: int = 8192,
    device: str | torch.device = "cpu",
) -> LogisticResult:
    """Choose C on held-out training images, fit all training images with it, score val.

    Features are standardised with the statistics of the images that are fitted. Of equal accuracies the lower cross-entropy
    decides. The fits go from the smallest C to the largest, each starting from the last.

    Args:
        train: Features (N, D), any float dtype, may be memory-mapped.
        train_labels: (N,).
        val: (M, D).
        val_labels: (M,).
        num_classes: None takes those of the training labels.
        Cs: To choose from; with one there is nothing to choose, and nothing is held out.
        held_out: Share of each class on which C is chosen.
        seed: Of the choice of held-out images.
        max_iter: Iterations of L-BFGS at most.
        chunk_size: Images at once.
        device: Where it is computed.
    """
    check_features(train, train_labels, "logistic regression: train")
    check_features(val, val_labels, "logistic regression: val")
    Cs = sorted(set(Cs))
    if not Cs or Cs[0] <= 0:
        raise ConfigError(f"logistic regression: Cs={Cs} must be positive numbers.")
    if max_iter < 1:
        raise ConfigError(f"logistic regression: max_iter={max_iter} must be at least 1.")
    if train.shape[1] != val.shape[1]:
        raise ConfigError(f"logistic regression: train features of width {train.shape[1]}, val of {val.shape[1]}.")
    num_classes = num_classes if num_classes is not None else int(train_labels.max()) + 1
    check_labels(train_labels, num_classes, "logistic regression: train")
    check_labels(val_labels, num_classes, "logistic regression: val")

    best_C, accuracies, num_held, start = Cs[0], {}, 0, None
    if len(Cs) > 1:
        kept, held = split_held_out(train_labels, held_out, seed)
        num_held = len(held)
        statistics = channel_statistics(train, kept, chunk_size)
        ranking = {}
        classifier = None
        for C in Cs:
            classifier = fit(
                train, train_labels, num_classes, C, kept, statistics, classifier, max_iter, chunk_size, device
            )
            correct, loss = classifier.evaluate(train, train_labels, held, chunk_size)
            accuracies[C] = 100 * float(correct.double().mean())
            ranking[C] = accuracies[C], -loss
            if ranking[C] == max(ranking.values()):
                best_C, start = C, classifier
    statistics = channel_statistics(train, None, chunk_size)
    final = fit(train, train_labels, num_classes, best_C, None, statistics, start, max_iter, chunk_size, device)
    correct, _ = final.evaluate(val, val_labels, None, chunk_size)
    choice = f"C={Cs[0]:g}..{Cs[-1]:g} of {len(Cs)}/held-out={held_out:g}" if len(Cs) > 1 else f"C={Cs[0]:g}"
    return LogisticResult(
        score=accuracy_score("logistic regression", correct, f"logistic/l-bfgs/standardised/{choice}"),
        C=best_C,
        held_out=accuracies,
        at_edge=len(Cs) > 1 and best_C in (Cs[0], Cs[-1]),
        classifier=final,
        num_train=len(train),
        num_held_out=num_held,
    )


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    C: float,
    rows: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    start: LinearClassifier | None = None,
    max_iter: int = 1000,
    chunk_size: int = 8192,
    device: str | torch.device = "cpu",
) -> LinearClassifier:
    """Fit one classifier; in float64 if the features are, otherwise in float32.

    Args:
        features: (N, D).
        labels: (N,).
        rows: Which of the N images; None takes all.
        statistics: Mean and deviation (D,) by which features are standardised; None leaves them as they are.
        start: Where to start, instead of zeros.
    """
    width, count = features.shape[1], len(features) if rows is None else len(rows)
    like = torch.empty(0, dtype=torch.promote_types(features.dtype, torch.float32), device=device)
    mean, std = statistics if statistics is not None else (torch.zeros(width), torch.ones(width))
    mean, std = mean.to(like), std.to(like)
    weight = start.weight.clone() if start else like.new_zeros(num_classes, width)
    bias = start.bias.clone() if start else like.new_zeros(num_classes)
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=max_iter,
        max_eval=25 * max_iter,  # never the reason to stop: a line search takes 25 at most
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
    )

    def cross_entropy() -> Tensor:
        """Mean over the images, float64, and its gradient."""
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for part, x in chunks(features, rows, chunk_size):
            scores = _scores(x, weight, bias, mean, std)
            loss = F.cross_entropy(scores, labels[part].to(weight.device), reduction="sum") / count
            loss.backward()
            total += loss.detach()
        return total

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * C * count)
        penalty.backward()
        return cross_entropy() + penalty.detach()

    with torch.enable_grad():  # the graphs are those of the two parameters alone
        optimizer.step(objective)
        reached = float(cross_entropy())
    iterations = optimizer.state[weight]["n_iter"]
    return LinearClassifier(weight.detach(), bias.detach(), mean, std, reached, iterations < max_iter)


def _scores(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return F.linear((x.to(weight) - mean) / std, weight, bias)
