"""The machine under the measurements: processor, memory, peak memory of this process, and electric power.

Every power figure carries the method it was obtained by and an interval. Nothing here names a host or a user, because
these facts are published with a report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError

POWERCAP = Path("/sys/class/powercap")
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

# Watts of package power per physical core under load, for parts whose model is hidden (a virtual machine) or unknown:
# vendors' TDP over cores of common parts. Server: EPYC 7763 280/64, EPYC 9554 360/64, Xeon 8480+ 350/56, Xeon 8272CL 195/26.
# Desktop: Ryzen 5600X 65/6, Core i5-12400 65/6. Laptop: Core i5-8250U 15/4, Ryzen 7 5800U 15/8.
WATTS_PER_CORE = {"server": 5.5, "desktop": 10.8, "laptop": 3.0}
SERVER = re.compile(r"epyc|xeon|opteron|neoverse|graviton|ampere|altra|virtual|qemu|kvm", re.IGNORECASE)
LAPTOP = re.compile(r"\d{3,4}(U|H|HS|HX|G\d|P)\b|apple m\d|snapdragon|atom|celeron", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """What a timing depends on. cores: physical, threads: logical that this process may use; memory in bytes."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    instructions: tuple[str, ...]
    kernels: str
    os: str
    python: str
    torch: str
    virtual: bool

    def to_json(self) -> dict[str, Any]:
        """The same facts as plain JSON values."""
        return {**vars(self), "instructions": list(self.instructions)}


@dataclass(frozen=True)
class Power:
    """Watts while computing, with the method and an interval. method: "wall meter", "RAPL", "TDP share" or "watts per core"."""

    method: str
    watts: float
    low: float
    high: float
    note: str


def describe_machine() -> Machine:
    """Facts about this machine, without its name or its user's."""
    # nf4 lies below this file; only its one word about the chosen kernels is asked for, and only here.
    import psutil

    from fourscore.nf4 import backend

    flags = _cpu_field("flags") or _cpu_field("Features") or ""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=_cpu_field("model name") or _cpu_field("Hardware") or platform.processor() or platform.machine(),
        cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        memory_bytes=_memory_bytes(psutil.virtual_memory().total),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags.split()),
        kernels=backend(),
        os=f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        virtual="hypervisor" in flags.split(),
    )


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself. Without it, bf16 products are slow, and f32 computes the same weights."""
    flags = set(((_cpu_field("flags") or "") + " " + (_cpu_field("Features") or "")).split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_field(name: str) -> str | None:
    """The first value of a field of /proc/cpuinfo, None where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _memory_bytes(installed: int) -> int:
    """Memory this process may use: what is installed, or the container's limit where that is lower."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(installed, int(limit))
    return installed


def peak_rss_bytes() -> int:
    """The most memory this process has held at once, in bytes: VmHWM, which a parent's size does not enter (ru_maxrss does)."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Zone:
    """One energy counter of the processor. limit: microjoules at which it starts again from zero."""

    name: str
    path: Path
    limit: int


def rapl_zones(root: Path = POWERCAP) -> list[Zone]:
    """Readable RAPL counters to add up: every package, and memory beside it. Empty where there are none, or root alone may read them.

    `core` and `uncore` are parts of their package and are left out, as is `psys`, whose scope differs between machines
    (Linux kernel, Documentation/power/powercap/powercap.rst).
    """
    zones = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if not name.startswith("package") and name != "dram":
                continue
            int((folder / "energy_uj").read_text())
            zones.append(Zone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return zones


class Meter:
    """Joules that the processor and its memory used inside the `with` block: `joules`, None where no counter is readable.

    A counter that ran over once is put right; blocks must be shorter than one round of it (minutes).
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = rapl_zones(root)
        self.joules: float | None = None

    def __enter__(self) -> Meter:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._read()
        if self._zones:
            used = (b - a if b >= a else b - a + z.limit for z, a, b in zip(self._zones, self._before, after, strict=True))
            self.joules = sum(used) / 1e6

    def _read(self) -> list[int]:
        return [int(zone.path.read_text()) for zone in self._zones]


def power(
    watts: float | None = None,
    machine: Machine | None = None,
    *,
    measured_watts: float | None = None,
    threads: int | None = None,
    tdp: Mapping[str, float] | None = None,
) -> Power:
    """Power under load, by the best method at hand: the user's wall meter, RAPL, the part's TDP, or a figure per core.

    watts: the study's wall-meter figure; it covers the whole machine, so it goes before RAPL (spec.Cost says so).
    machine: this one where none is given. measured_watts: RAPL joules over seconds of the timed region. threads: how many
    compute, all where not given. tdp: watts by part name; only used on bare metal, where the part's own number of cores is known.

    Intervals: a wall meter is taken as good to 10%. RAPL leaves out the power supply, disks and board, and includes every
    other program: 0.9 to 2 times. Estimates from TDP are wrong by up to 40% against a meter (arXiv 2509.22092) and are
    widened to 0.5 to 2 times, for what the rest of the machine draws.
    """
    if watts is not None:
        if not watts > 0:
            raise FourscoreError(f"a power of {watts} watts", where="cost.watts", todo="give the reading of the wall meter under load")
        return Power("wall meter", watts, 0.9 * watts, 1.1 * watts, "read by the user from a wall meter; the whole machine")
    if measured_watts is not None:
        note = "the processor's own counters (RAPL) over the timed requests: package and memory, other programs included, power supply not"
        return Power("RAPL", measured_watts, 0.9 * measured_watts, 2.0 * measured_watts, note)
    machine = machine or describe_machine()
    used = min(threads or machine.cores, machine.cores)
    name = part_name(machine.cpu)
    if tdp and name in tdp and not machine.virtual:
        share = tdp[name] * used / machine.cores
        note = f"estimate: {tdp[name]:g} W TDP of {name}, {used} of {machine.cores} cores used"
        return Power("TDP share", share, 0.5 * share, 2.0 * share, note)
    kind = processor_kind(machine)
    guess = WATTS_PER_CORE[kind] * used
    note = f"estimate: {used} cores at {WATTS_PER_CORE[kind]:g} W, usual for a {kind} processor" + (
        " (a virtual machine)" if machine.virtual else ""
    )
    return Power("watts per core", guess, 0.5 * guess, 2.0 * guess, note)


def processor_kind(machine: Machine) -> str:
    """ "server", "laptop" or "desktop", from the processor's name; a virtual machine is taken to run on a server."""
    if machine.virtual or SERVER.search(machine.cpu):
        return "server"
    return "laptop" if LAPTOP.search(machine.cpu) else "desktop"


def part_name(cpu: str) -> str:
    """A processor's name as lists of parts write it: "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz" -> "Intel Core i5-8250U"."""
    name = re.sub(r"\((R|TM|C)\)|®|™|^\d+(?:th|rd|nd|st) Gen ", "", cpu)
    name = re.sub(r"\s*@.*$", "", name)
    name = re.sub(r"\b(CPU|Processor|with .*$|w/ .*$|\d+-Core|(Two|Four|Six|Eight|Twelve|Sixteen)-Core)", "", name)
    return " ".join(name.split())
