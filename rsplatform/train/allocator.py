"""Keeps the memory that a training step frees, instead of giving it back to the kernel and asking again.

glibc maps every large block anew, and the kernel zeroes its pages: a CPU training step that frees some hundred
megabytes pays for that each time. No torch, no state; where the C library is another one, nothing happens.
"""

import ctypes
import platform

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# The same for a process that is yet to be started. One arena, because glibc unmaps the freed heaps of all others,
# and Ray Train runs the training function in a thread, which would get an arena of its own.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


def keep_freed_memory() -> bool:
    """Large blocks come from the heap from now on, and the heap never shrinks; False without glibc.

    For a process whose main thread trains on the CPU: it then holds its peak memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
