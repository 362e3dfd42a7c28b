"""The NF4 kernels beside their peers: bitsandbytes, and torch's dense bf16 product, in one run on one machine.

    python bench/nf4_kernels.py [--threads N] [--quick] [--json FILE]

Only ratios are worth quoting. Ours and the peer take turns, and a ratio is the median over turns, so that another program's
load falls on both. With --threads 1 the clock is the thread's CPU time, which leaves out what other programs take.
"""

# The lambdas of a loop's turn run within that turn.
# ruff: noqa: B023

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib

from fourscore import nf4
from fourscore.machine import describe_machine
from fourscore.nf4 import kernels

Work = Callable[[], Any]


def compare(ours: Work, peer: Work, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Median seconds of both, and the median over turns of peer / ours (above 1: ours is faster)."""
    times: list[tuple[float, float]] = []
    ours(), peer()
    for _ in range(repeats):
        start = clock()
        ours()
        middle = clock()
        peer()
        times.append((middle - start, clock() - middle))
    return (
        statistics.median(t for t, _ in times),
        statistics.median(t for _, t in times),
        statistics.median(b / a for a, b in times),
    )


def their_layer(w: torch.Tensor) -> torch.nn.Module:
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.bfloat16)
    layer.load_state_dict({"weight": w})
    return layer.to("cpu")


def forward_backward(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> None:
    leaf = x.detach().requires_grad_()
    layer(leaf).backward(dy)


def their_dequantise(w: torch.Tensor, out: torch.Tensor) -> Work:
    """Their C kernel into a reused buffer (their Python has no such call on a CPU), scales not double-quantised."""
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, state.absmax, out)]
    sizes = [ctypes.c_longlong(n) for n in (64, *w.shape)]
    kept = (packed, state)
    return lambda: (lib.cdequantize_blockwise_cpu_nf4_bf16(*pointers, *sizes), kept)


def measure(repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, against: str, ours: Work, peer: Work, n: int = repeats) -> None:
        mine, theirs, ratio = compare(ours, peer, n, clock)
        rows.append({"what": what, "peer": against, "ours_ms": mine * 1e3, "peer_ms": theirs * 1e3, "ratio": ratio})
        print(f"{what:42} {against:24} {mine * 1e3:10.3f} {theirs * 1e3:10.3f} {ratio:8.2f}", flush=True)

    print(f"{'':42} {'peer':24} {'ours ms':>10} {'peer ms':>10} {'ratio':>8}")
    torch.manual_seed(0)
    w = torch.randn((4096, 4096)).bfloat16()
    row(
        "quantise 4096x4096 bf16, double quant",
        "bitsandbytes",
        lambda: nf4.quantize(w),
        lambda: bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
        max(3, repeats // 4),
    )
    big = torch.randn((11008, 4096)).bfloat16()
    packed, buffer = nf4.quantize(big), torch.empty_like(big)
    row(
        "dequantise 11008x4096 to bf16, reused buffer",
        "bitsandbytes' C kernel",
        lambda: nf4.dequantize(packed, out=buffer),
        their_dequantise(big, buffer),
    )
    stream = torch.empty(packed.nbytes // 4, dtype=torch.int32).fill_(1)
    with torch.inference_mode():
        x = torch.randn((1, 4096)).bfloat16()
        row("1 row, 11008x4096", "reading as many bytes", lambda: nf4.linear(x, packed), lambda: stream.sum(dtype=torch.int32), repeats * 2)
        for shape in ((11008, 4096), (4096, 4096), (1536, 576), (576, 1536), (576, 576)):
            dense = torch.randn(shape).bfloat16()
            q, theirs = nf4.quantize(dense), their_layer(dense).eval()
            for count in (1, 4):
                x = torch.randn((count, shape[1])).bfloat16()
                row(
                    f"{count} row{'s' if count > 1 else ''}, {shape[0]}x{shape[1]}",
                    "bitsandbytes, eval",
                    lambda: nf4.linear(x, q),
                    lambda: theirs(x),
                    repeats * 4,
                )
    for shape in ((4096, 4096), (576, 576), (192, 576), (1536, 576), (576, 1536)):
        dense = torch.randn(shape).bfloat16()
        q, theirs = nf4.quantize(dense), their_layer(dense).train()
        x, dy = torch.randn((512, shape[1])).bfloat16(), torch.randn((512, shape[0])).bfloat16()
        n = max(3, repeats // 2) if shape[0] > 2000 else repeats
        name = f"512 rows, {shape[0]}x{shape[1]}"
        row(f"{name}, forward", "torch dense bf16", lambda: kernels.forward(x, q, None), lambda: torch.nn.functional.linear(x, dense), n)
        row(f"{name}, backward", "torch dense bf16", lambda: kernels.backward(dy, q), lambda: dy @ dense, n)
        row(
            f"{name}, forward and backward",
            "bitsandbytes, train",
            lambda: forward_backward(lambda t: nf4.linear(t, q), x, dy),
            lambda: forward_backward(theirs, x, dy),
            n,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"kernels {nf4.backend()}, {arguments.threads} thread(s)")
    rows = measure(5 if arguments.quick else 15, clock)
    if arguments.json:
        from dataclasses import asdict

        from fourscore.files import write_json

        record = {"kernels": nf4.backend(), "threads": arguments.threads, "machine": asdict(describe_machine()), "rows": rows}
        write_json(arguments.json, json.loads(json.dumps(record, default=str)))


if __name__ == "__main__":
    main()
