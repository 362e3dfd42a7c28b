"""Giving memory-mapped pages of weight files back to the system once their tensors have been read."""

from __future__ import annotations

import ctypes
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
    wanted = {str(f.resolve()) for f in files}
    libc = ctypes.CDLL(None, use_errno=True)
    released = 0
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        found = [line.rstrip("\n").split(maxsplit=5) for line in maps]
    for parts in found:
        if len(parts) == 6 and parts[5] in wanted:
            first, last = (int(edge, 16) for edge in parts[0].split("-"))
            if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED) == 0:
                released += last - first
    return released
