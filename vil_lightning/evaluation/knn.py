"""Nearest neighbours of features in chunks: DINO's protocol for more images than fit in memory.

The maths is that of `vil_lightning.knn`. Here the bank is read a chunk at a time, and of each query only its k nearest bank
features so far are kept: besides the k neighbours, memory holds one chunk of the bank, one of the queries, and their product.

A neighbour is an int64: the bits of its similarity above those of its place in the bank. Such numbers are sorted by
similarity and, where it is equal, by the lower place, whatever the order in which chunks come. Similarities are computed in
tiles of one shape, as a matrix product rounds differently with its shape: a result depends neither on the chunks nor on the
number of processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.inputs import check_features, check_labels
from vil_lightning.evaluation.scores import Score, accuracy_score

KS = (10, 20, 100, 200)
QUERY_TILE, BANK_TILE = 256, 1024
_PLACES = 2**32 - 1  # the largest place in the bank that fits in the lower half of an int64


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    **options: int | str | None,
) -> list[Score]:
    """Top-1 accuracy for each k, see `knn`. The protocol of DINO (`eval_knn.py`) takes no choice: every k is reported."""
    correct = knn(bank, bank_labels, queries, query_labels, ks, temperature, **options)  # type: ignore[arg-type]
    variant = "" if temperature == 0.07 else f"/temperature={temperature:g}"
    return [accuracy_score(f"kNN, k={k}", hits, f"knn/dino{variant}/k={k}") for k, hits in correct.items()]


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    *,
    num_classes: int | None = None,
    query_chunk: int = 1024,
    bank_chunk: int = 8192,
    device: str | torch.device = "cpu",
) -> dict[int, Tensor]:
    """Which queries are classified correctly, bool (M,) on the CPU, for each k.

    Each of the k nearest bank features (cosine similarity s in float32) votes for its class with weight
    exp(s / temperature); between classes of equal votes the lower one wins.

    With `torch.distributed` initialised, each process takes a part of the queries and all return the whole result; all
    must call with the same tensors.

    Args:
        bank: (N, D), any float dtype, may be memory-mapped.
        bank_labels: (N,).
        queries: (M, D).
        query_labels: (M,); a class that the bank lacks is never right.
        ks: Neighbourhood sizes; those larger than N use all N.
        num_classes: Labels must be below; None takes any from 0 up.
        query_chunk: Queries at once, rounded up to tiles of 256. A chunk costs one pass over the bank.
        bank_chunk: Bank features at once, rounded up to tiles of 1,024.
        device: Where the products are computed.

    References:
        Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294.
    """
    _check(bank, bank_labels, queries, query_labels, ks, temperature, num_classes, query_chunk, bank_chunk)
    start, stop = _own_part(len(queries))
    own = slice(start, stop)
    error = None
    correct = {}
    try:
        with _full_float32_products():
            correct = _correct(
                bank, bank_labels, queries[own], query_labels[own], ks, temperature, query_chunk, bank_chunk, device
            )
    except ConfigError as found:  # the other processes wait for this one: all of them raise it
        error = found
    return _gathered(correct, error)


def _correct(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    query_chunk: int,
    bank_chunk: int,
    device: str | torch.device,
) -> dict[int, Tensor]:
    """`knn` of the queries of one process; there may be none."""
    classes = int(bank_labels.max()) + 1
    largest = min(max(ks), len(bank))
    size = _tiled(query_chunk, QUERY_TILE)
    parts: dict[int, list[Tensor]] = {k: [torch.zeros(0, dtype=torch.bool)] for k in ks}
    for first in range(0, len(queries), size):
        chunk, labels = queries[first : first + size], query_labels[first : first + size]
        similarity, places = _nearest(chunk, bank, largest, bank_chunk, torch.device(device))
        # Relative to the nearest one: the same ranking, and no overflow at any temperature.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        neighbours = bank_labels[places]
        for k in parts:
            votes = torch.zeros(len(chunk), classes, dtype=torch.float64)
            votes.scatter_add_(1, neighbours[:, :k], weights[:, :k])
            parts[k].append(votes.argmax(1) == labels)
    return {k: torch.cat(pieces) for k, pieces in parts.items()}


def _nearest(queries: Tensor, bank: Tensor, k: int, bank_chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Similarities (m, k), float32, and places in the bank (m, k) of the nearest bank features, on the CPU, best first."""
    count = len(queries)
    queries = _unit(queries, QUERY_TILE, device)
    nearest = torch.empty(count, 0, dtype=torch.int64, device=device)
    size = _tiled(bank_chunk, BANK_TILE)
    for first in range(0, len(bank), size):
        chunk = bank[first : first + size]
        similarity = _products(queries, _unit(chunk, BANK_TILE, device))[:count, : len(chunk)]
        keys = _keys(similarity, torch.arange(first, first + len(chunk), device=device))
        del similarity
        keys = keys.topk(min(k, len(chunk)), dim=1).values  # before they are joined: a copy of few, not of all
        nearest = torch.cat([nearest, keys], dim=1)
        nearest = nearest.topk(min(k, nearest.shape[1]), dim=1).values
    nearest = nearest.cpu()
    return _similarity_of(nearest), _PLACES - (nearest & _PLACES)


def _unit(features: Tensor, tile: int, device: torch.device) -> Tensor:
    """Features of length 1 in float32, with rows of zeros up to a whole tile."""
    features = F.normalize(features.to(device).float(), dim=1)
    if not features.isfinite().all():
        raise ConfigError("knn: features that are not finite (NaN or infinite). Check the backbone and its precision.")
    return F.pad(features, (0, 0, 0, -len(features) % tile))


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Product x @ y.T (m, n) by tiles of one shape: the same rows give the same bits wherever they are."""
    result = torch.empty(len(x), len(y), device=x.device)
    for i in range(0, len(x), QUERY_TILE):
        for j in range(0, len(y), BANK_TILE):
            result[i : i + QUERY_TILE, j : j + BANK_TILE] = x[i : i + QUERY_TILE] @ y[j : j + BANK_TILE].T
    return result


def _keys(similarity: Tensor, places: Tensor) -> Tensor:
    """Int64 (m, n), larger for a larger similarity (m, n), float32, and where it is equal for a lower place (n,)."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats fall as their bits rise
    return ordered.long().bitwise_left_shift_(32).bitwise_or_(_PLACES - places)


def _similarity_of(keys: Tensor) -> Tensor:
    ordered = keys >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int().view(torch.float32)


def _tiled(size: int, tile: int) -> int:
    return -(-size // tile) * tile


@contextmanager
def _full_float32_products() -> Iterator[None]:
    """No TF32, whatever the run has allowed for its training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- processes --------------------------------------------------------------------------------------------------------


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_part(count: int) -> tuple[int, int]:
    """First and last (exclusive) of the queries of this process, in whole tiles."""
    if not _distributed():
        return 0, count
    share = _tiled(-(-count // dist.get_world_size()), QUERY_TILE)
    return min(dist.get_rank() * share, count), min((dist.get_rank() + 1) * share, count)


def _gathered(correct: dict[int, Tensor], error: ConfigError | None) -> dict[int, Tensor]:
    """The results of all processes, or the first error."""
    parts = [(correct, error)]
    if _distributed():
        parts = parts * dist.get_world_size()
        dist.all_gather_object(parts, (correct, error))
    for _, found in parts:
        if found is not None:
            raise found
    return {k: torch.cat([part[k] for part, _ in parts]) for k in correct}


def _check(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    num_classes: int | None,
    query_chunk: int,
    bank_chunk: int,
) -> None:
    check_features(bank, bank_labels, "knn: bank")
    check_features(queries, query_labels, "knn: queries")
    if bank.shape[1] != queries.shape[1]:
        raise ConfigError(
            f"knn: bank of width {bank.shape[1]}, queries of {queries.shape[1]}. Use one read-out for both."
        )
    if not ks or min(ks) < 1:
        raise ConfigError(f"knn: ks={list(ks)} must be numbers from 1 up.")
    if not temperature > 0:
        raise ConfigError(f"knn: temperature={temperature} must be above 0.")
    if min(query_chunk, bank_chunk) < 1:
        raise ConfigError(f"knn: query_chunk={query_chunk} and bank_chunk={bank_chunk} must be at least 1.")
    for labels, what in ((bank_labels, "knn: bank"), (query_labels, "knn: queries")):
        check_labels(labels, num_classes if num_classes is not None else int(labels.max()) + 1, what)
