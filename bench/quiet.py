"""Is this machine quiet? How much of its processors other programs take, and what is left of speed and bandwidth.

    python bench/quiet.py [--threads N]            # prints JSON; about eight seconds

A timing is worth what the machine's load lets it be worth, so each result of `bench/run.py` carries these figures. What other
programs take comes from the kernel's own counters (/proc/stat, stolen time of a virtual machine included), not from a guess.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

IDLE = (3, 4)  # fields of a cpu line in /proc/stat: idle, and idle while a disk is waited for
GUEST = 8  # from here on the line counts time a second time
BUSY, SHARED = 0.5, 0.1  # cores that others take: at BUSY a bench is refused, at SHARED it is run with a warning


def taken() -> float:
    """Core-seconds that all programs together have taken since the machine started, on the cores this process may use."""
    ours = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in ours:
            ticks += sum(int(f) for i, f in enumerate(fields[:GUEST]) if i not in IDLE)
    return ticks / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Core-seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Others:
    """`busy()`: cores that other programs kept busy, on average, since this was made."""

    def __init__(self) -> None:
        self._began, self._taken, self._own = time.monotonic(), taken(), own()

    def busy(self) -> float:
        """Never below 0: the kernel counts the two sums by different clocks."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return max(0.0, (taken() - self._taken - (own() - self._own)) / seconds)


def _spin(seconds: float) -> float:
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        pass
    return (time.process_time() - used) / (time.perf_counter() - began)


def spin_share(threads: int, seconds: float = 1.0) -> float:
    """The share of a core that the worst off of `threads` spinning processes gets: 1 on a quiet machine."""
    with ProcessPoolExecutor(threads, mp_context=get_context("spawn")) as pool:
        list(pool.map(_spin, [0.01] * threads))
        return min(pool.map(_spin, [seconds] * threads))


def read_bandwidth(threads: int, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second at which all threads read memory (a sum of int32 that no cache holds), the median of some repeats."""
    import torch

    torch.set_num_threads(threads)
    words = torch.ones(megabytes << 18, dtype=torch.int32)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        words.sum(dtype=torch.int32)
        seconds.append(time.perf_counter() - began)
    return words.nbytes / statistics.median(seconds)


def load(threads: int | None = None, watch: float = 2.0) -> dict[str, Any]:
    """The machine's load: load averages, cores others keep busy while this program sleeps, spin share, read bandwidth."""
    threads = threads or len(os.sched_getaffinity(0))
    others = Others()
    time.sleep(watch)
    busy = others.busy()
    return {
        "loadavg": list(os.getloadavg()),
        "others_busy_cores": round(busy, 3),
        "spin_share": round(spin_share(threads), 3),
        "read_gb_per_second": round(read_bandwidth(threads) / 1e9, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: every core")
    print(json.dumps(load(parser.parse_args().threads)))
