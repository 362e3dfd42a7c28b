"""Giving memory back to the system while weights are loaded: pages of files that were read, heap that was freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_MADV_DONTNEED = 4  # Linux, linux/mman.h


def release_pages(files: Sequence[Path]) -> int:
    """Drop this process's resident pages of these files; returns the bytes of the mappings (0 where that is not possible).

    Nothing is lost: the mappings stay valid and are read again from the file when touched. Written-to (copied) pages of a
    private mapping would be: call it only on weights that nobody has changed.
    """
    if not sys.platform.startswith("linux"):
        return 0
    # looked up anew every time: addresses kept from before might be somebody else's memory by now
    wanted = {os.fsencode(f.resolve()) for f in files}
    libc = ctypes.CDLL(None, use_errno=True)
    released = 0
    found = [line for line in Path("/proc/self/maps").read_bytes().splitlines() if line.endswith(tuple(wanted))]
    for line in found:
        parts = line.split(maxsplit=5)
        if parts[5] in wanted:
            first, last = (int(edge, 16) for edge in parts[0].split(b"-"))
            if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED) == 0:
                released += last - first
    return released


def release_freed() -> None:
    """Give the whole pages of freed heap back to the system, wherever in the heap they lie (glibc; elsewhere nothing happens).

    Layers of different sizes, each converted and freed, leave holes that the next one does not fit: up to a dense model in all.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
