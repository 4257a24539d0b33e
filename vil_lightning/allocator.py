"""Memory that a CPU run has freed stays with the process, as a GPU's caching allocator does it."""

import ctypes
import os
import platform

# Options of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the next activations of the same size.

    By default it gives large blocks back to Linux at once and asks for them again in the next layer; every page is then cleared
    anew, which takes up to a quarter of a forward pass at 224 px (benchmarks/PERFORMANCE.md). In exchange the process holds
    what it once needed until it ends.

    Returns:
        False where that is not to be done: on other systems and C libraries, or if the environment sets an allocator's options.
    """
    if platform.libc_ver()[0] != "glibc" or any(
        name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))  # -1: never
