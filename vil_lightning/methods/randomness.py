"""Randomness inside the network (drop path, dropout) that does not depend on where a run was interrupted."""

import os
import random

import lightning as L
import numpy as np
import torch


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
