"""Weighted nearest-neighbour classification of features, the protocol of DINO."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k.

    Each of the k nearest bank features (cosine similarity s) votes for its class with weight exp(s / temperature).
    Computed in float32, whatever the dtype of the features, in chunks of queries.

    Args:
        bank: (N, D).
        bank_labels: (N,).
        queries: (M, D).
        query_labels: (M,).
        ks: Neighbourhood sizes; those larger than N use all N.

    References:
        Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294 (k = 20 of 10, 20, 100, 200 usually wins).
    """
    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = dict.fromkeys(ks, 0)
    largest = min(max(ks), len(bank))
    for features, labels in zip(queries.split(chunk_size), query_labels.split(chunk_size), strict=True):
        similarity, neighbours = (F.normalize(features.float(), dim=1) @ bank.T).topk(largest, dim=1)
        # Relative to the nearest one: the same ranking, and no overflow at any temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        neighbour_labels = bank_labels[neighbours]
        for k in ks:
            votes = torch.zeros(len(features), num_classes, device=features.device)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            correct[k] += int((votes.argmax(1) == labels).sum())
    return {k: 100 * hits / len(queries) for k, hits in correct.items()}
