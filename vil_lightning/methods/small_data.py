"""Settings of self-distillation that should follow the data set and the run: the published ones are for ImageNet-1k.

Every function returns a value and, for the start of the run, the reason in words. At the size and length of the published runs
they give the published values; below it they are rules of thumb of this project, tried on a few thousand images only.
"""

import math


def choose_num_prototypes(num_images: int, largest: int = 65536) -> tuple[int, str]:
    """About one prototype for twenty images, as DINO has on ImageNet-1k; a power of two from 1,024 to `largest`.

    More prototypes than the images can fill stay unused, and their scores cost memory and time.
    """
    value = 2 ** round(math.log2(max(num_images / 20, 1)))
    value = min(max(value, 1024), largest)
    return value, f"about {num_images} training images / 20, a power of two from 1024 to {largest}"


def choose_teacher_momentum(total_steps: int, longest_memory: float = 0.996) -> tuple[float, str]:
    """A teacher that averages over at most a tenth of the run; `longest_memory` in long runs.

    With 0.996 it averages over the last 1 / (1 - 0.996) = 250 steps. In a run of a few hundred steps such a teacher would still
    be close to its random start at the end.
    """
    value = min(longest_memory, max(1 - 10 / max(total_steps, 1), 0.9))
    return value, f"averages over {1 / (1 - value):.0f} of {total_steps} steps"


def choose_teacher_temp(images_seen: int) -> tuple[float, str]:
    """0.04 in short runs, 0.07 in long ones: DINO's 100 and 300 epochs on ImageNet-1k are 128 and 384 million images."""
    value = 0.07 if images_seen >= 250e6 else 0.04
    return value, f"{images_seen / 1e6:.3g} million images seen; 0.04 below 250 million, 0.07 above"
