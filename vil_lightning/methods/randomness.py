"""Randomness inside the network (drop path, dropout) that does not depend on where a run was interrupted."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch


@contextmanager
def float32_weights() -> Iterator[None]:
    """Build networks in float32, whatever `trainer.precision` is; Lightning rounds the weights afterwards.

    With bf16-true it would have them drawn in bfloat16, whose uniform numbers hit 0 and 1: a truncated normal distribution,
    made from them by an inverse error function, then has values at its bounds, a hundred standard deviations away.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if before in (torch.bfloat16, torch.float16) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seed_step(trainer: L.Trainer, batch_idx: int) -> None:
    """Seed torch, Python and numpy (timm's MixUp) from (run seed, epoch, batch, rank). Call in `on_train_batch_start`.

    A checkpoint then needs no generator states, of which it could hold only one rank's anyway.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    position = (trainer.current_epoch << 32) + (batch_idx << 12) + trainer.global_rank
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) % (1 << 63)
    mixed ^= (
        mixed >> 32
    )  # torch's CPU generator and numpy look at the low 32 bits only, which the epoch had not reached
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % (1 << 32))
