"""Durations and schedules: pure functions of the optimiser step, so that a resumed run needs no schedule state."""

import math
import re
from contextlib import suppress

from vil_lightning.errors import ConfigError

Duration = str | int | float

_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(steps?|epochs?|%)\s*")


def resolve_steps(duration: Duration, *, steps_per_epoch: float, total_steps: int, key: str, cut: bool = False) -> int:
    """Optimiser steps of a duration.

    Args:
        duration: `"500 steps"`, `"10 epochs"`, `"2.5 epochs"`, `"10%"` (of the run), or a number that says so by itself: 0,
            or a fraction of the run below 1.
        steps_per_epoch: Optimiser steps per epoch.
        total_steps: Optimiser steps of the run.
        key: The setting's name, for the error message.
        cut: Cut a duration that is longer than the run, instead of refusing it.

    Raises:
        ConfigError: If the duration cannot be read, or is longer than the run.
    """
    if isinstance(duration, str):
        with suppress(ValueError):
            duration = float(duration)  # how the command line hands over 0 or 0.1
    match = _DURATION.fullmatch(str(duration)) if isinstance(duration, str) else None
    if match:
        number, unit = float(match[1]), match[2]
        factor = {"s": 1.0, "e": steps_per_epoch, "%": total_steps / 100}[unit[0]]
        steps = round(number * factor)
    elif isinstance(duration, int | float) and not isinstance(duration, bool) and 0 <= duration < 1:
        steps = round(duration * total_steps)
    else:
        raise ConfigError(
            f"{key}={duration!r} is no duration. Write '500 steps', '10 epochs', '10%', or a fraction below 1."
        )
    if steps > total_steps and cut:
        return total_steps
    if steps > total_steps:
        raise ConfigError(
            f"{key}={duration!r} is {steps} steps, but the run has {total_steps}. "
            f"Shorten {key}, or lengthen trainer.max_epochs or trainer.max_steps."
        )
    return steps


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which the step after the last one would reach."""
    progress = min(step / max(total_steps, 1), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float, end: float) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup_steps - 1`, then `cosine` from `peak` to `end`.

    The official DINO code has the same two pieces.
    """
    if step < warmup_steps:
        return peak * (step / (warmup_steps - 1) if warmup_steps > 1 else 1.0)
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, end)


def linear_cosine(step: int, total_steps: int, warmup_steps: int, start: float, peak: float, end: float) -> float:
    """Linear from `start`, which the step before the first one would have, to `peak` at step `warmup_steps - 1`, then half
    a cosine to `end` at the last step.

    The ViL recipes (NX-AI/vision-lstm) have `start` 0. With `end == peak` the rate stays constant after the warm-up.
    """
    done = step + 1
    if done <= warmup_steps:
        return start + (peak - start) * done / warmup_steps
    return cosine(done - warmup_steps, total_steps - warmup_steps, peak, end)


def linear_then_constant(step: int, warmup_steps: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at step `warmup_steps`, constant afterwards."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps
