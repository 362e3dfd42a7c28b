"""Facts about the machine: nothing personal in them, peak memory that follows what is touched, power with its method."""

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fourscore.files import FourscoreError
from fourscore.machine import Machine, Meter, describe_machine, part_name, peak_rss_bytes, power, rapl_zones

LAPTOP = Machine("Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 4, 8, 8 << 30, ("avx2",), "avx2", "Linux", "3.12", "2.13", False)
HIDDEN = Machine("AMD EPYC", 2, 2, 8 << 30, ("avx2",), "avx512", "Linux", "3.12", "2.13", True)


def counter(root: Path, name: str, zone: str, energy: str, limit: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(zone + "\n")
    (folder / "energy_uj").write_text(energy + "\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_machine_is_described_without_its_name_or_its_users():
    text = json.dumps(describe_machine().to_json())
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.threads >= 1
    assert machine.memory_bytes > 100e6


def test_peak_memory_grows_by_what_is_touched_and_stays_after_it_is_given_back():
    program = """if True:
        from fourscore.machine import peak_rss_bytes as peak
        before = peak()
        block = b"1" * (150 << 20)
        held = peak()
        del block
        print(held - before, peak() - held)
    """
    grown, later = map(int, subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert 145 << 20 <= grown < 200 << 20
    assert abs(later) < 20 << 20  # the kernel keeps this count within a few pages


def test_peak_memory_is_this_process_alone():
    """ru_maxrss would start at the parent's size here."""
    big = bytearray(b"1") * (200 << 20)
    program = "from fourscore.machine import peak_rss_bytes as peak; print(peak())"
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert child < 150 << 20 < len(big) < peak_rss_bytes()


def test_rapl_adds_packages_and_memory_and_no_part_twice(tmp_path):
    counter(tmp_path, "intel-rapl:0", "package-0", "1000000")
    counter(tmp_path, "intel-rapl:0:0", "core", "900000")
    counter(tmp_path, "intel-rapl:0:1", "dram", "50000")
    counter(tmp_path, "intel-rapl:1", "package-1", "7")
    counter(tmp_path, "intel-rapl:2", "psys", "9")
    counter(tmp_path, "intel-rapl-mmio:0", "package-0", "1000000")
    assert [zone.name for zone in rapl_zones(tmp_path)] == ["package-0", "dram", "package-1"]


def test_rapl_meter_gives_joules_also_when_a_counter_starts_again(tmp_path):
    package = counter(tmp_path, "intel-rapl:0", "package-0", "9000000", limit=10_000_000)
    memory = counter(tmp_path, "intel-rapl:0:1", "dram", "100")
    with Meter(tmp_path) as meter:
        package.write_text("2000000")  # 1 J to the end of the counter, 2 J after it
        memory.write_text("500100")
    assert meter.joules == pytest.approx(3.5)


def test_without_a_readable_counter_there_are_no_joules(tmp_path):
    counter(tmp_path, "intel-rapl:0", "package-0", "not a number")
    for root in (tmp_path, tmp_path / "absent"):
        with Meter(root) as meter:
            pass
        assert meter.joules is None


def test_power_from_a_wall_meter_goes_first_then_rapl():
    told = power(40.0, LAPTOP, measured_watts=12.0, tdp={"Intel Core i5-8250U": 15.0})
    assert (told.method, told.watts) == ("wall meter", 40.0)
    assert (told.low, told.high) == pytest.approx((36.0, 44.0))
    told = power(None, LAPTOP, measured_watts=12.0, tdp={"Intel Core i5-8250U": 15.0})
    assert (told.method, told.watts, told.high) == ("RAPL", 12.0, 24.0)


def test_estimated_power_is_the_share_of_the_cores_with_a_wide_interval():
    told = power(None, LAPTOP, threads=2, tdp={"Intel Core i5-8250U": 15.0})  # 15 W * 2 of 4 cores
    assert (told.method, told.watts, told.low, told.high) == ("TDP share", 7.5, 3.75, 15.0)
    told = power(None, LAPTOP, threads=8, tdp={"Intel Core i5-8250U": 15.0})  # 8 threads are 4 cores
    assert told.watts == 15.0


def test_a_virtual_machine_never_gets_a_whole_parts_tdp():
    told = power(None, HIDDEN, tdp={"AMD EPYC": 360.0})
    assert (told.method, told.watts, told.low, told.high) == ("watts per core", 11.0, 5.5, 22.0)
    assert "virtual" in told.note


def test_no_power_is_an_error():
    with pytest.raises(FourscoreError, match="wall meter"):
        power(0.0, LAPTOP)


@pytest.mark.parametrize(
    ("cpu", "part"),
    [
        ("Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", "Intel Core i5-8250U"),
        ("12th Gen Intel(R) Core(TM) i5-12400", "Intel Core i5-12400"),
        ("AMD Ryzen 7 5800U with Radeon Graphics", "AMD Ryzen 7 5800U"),
        ("AMD Ryzen 5 5600X 6-Core Processor", "AMD Ryzen 5 5600X"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763"),
        ("Intel(R) Xeon(R) Platinum 8272CL CPU @ 2.60GHz", "Intel Xeon Platinum 8272CL"),
    ],
)
def test_part_names_as_lists_of_parts_write_them(cpu, part):
    assert part_name(cpu) == part
