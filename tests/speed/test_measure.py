"""Interleaving, ratios within rounds, memory of a call."""

import torch

from vil_lightning.speed import measure

CPU = torch.device("cpu")


def test_interleaved__measures_all_in_turn_in_every_round() -> None:
    calls: list[str] = []

    def measured(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = measure.interleaved({name: lambda name=name: measured(name) for name in "abc"}, 4)  # type: ignore[misc]
    assert "".join(calls) == "abcbcacababc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_seconds__are_positive() -> None:
    assert measure.seconds(lambda: None, CPU) > 0


def test_ratio__is_taken_within_rounds() -> None:
    # Twice as fast in each round of a machine that gets ten times slower: the medians alone would say 2 as well, but not in
    # the second case, where the drift has an odd number of slow rounds.
    assert measure.ratio([1, 10, 1], [2, 20, 2]) == (2, 2, 2)
    middle, low, high = measure.ratio([1, 1, 4, 4, 4], [3, 3, 4, 4, 20])
    assert (middle, low, high) == (3, 1, 3)
    assert measure.ratio([2.0], [3.0]) == (1.5, 1.5, 1.5)


def test_peak_memory__is_what_a_call_needs_at_most() -> None:
    def call() -> None:
        first = torch.ones(16 * 2**20)  # 64 MiB
        second = torch.ones(16 * 2**20)
        del first
        third = torch.ones(16 * 2**20)
        del second, third

    measured = measure.peak_memory(call, CPU)
    # Two of them at a time; the allocator may keep the pages of the first one.
    assert measured is None or 120 * 2**20 <= measured <= 208 * 2**20


def test_matmul_peak__is_a_rate() -> None:
    assert 1e8 < measure.matmul_peak(CPU, torch.float32) < 1e14
