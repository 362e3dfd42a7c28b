"""Energy, carbon and money against arithmetic by hand."""

import json

import pytest

from fourscore.evaluate.energy import Tables, carbon_intensity, cost_of_answers, parse_tables, read_tables
from fourscore.files import FourscoreError
from fourscore.machine import Power
from fourscore.spec import Cost

MIX = json.dumps(
    {
        "AAA": {"carbon_intensity": 100.0, "total_TWh": 3.0, "year": 2023},
        "BBB": {"carbon_intensity": 500.0, "total_TWh": 1.0, "year": 2022},
        "NUL": {"carbon_intensity": 0.0, "total_TWh": 9.0, "year": 2022},
    }
).encode()
PARTS = b"Name,TDP\nIntel Core i5-8250U,15.0\n"


def test_thousand_answers_by_hand():
    """36 W for half a second: 18 J an answer, 18 kJ the thousand, 0.005 kWh; at 100 g/kWh 0.5 g; at 0.20 a kWh 0.001.

    The machine: 876.6 over one year of 8,766 hours is 0.10 an hour; 500 s are 0.013888...
    """
    cost = Cost(country="AAA", price_per_kwh=0.2, machine_price=876.6, machine_years=1.0, currency="CHF")
    told = cost_of_answers(Power("wall meter", 36.0, 18.0, 72.0, "read"), 0.5, cost, parse_tables(MIX, PARTS))
    assert told["per_1000_answers"]["kwh"] == pytest.approx({"value": 0.005, "low": 0.0025, "high": 0.01})
    assert told["per_1000_answers"]["kg_co2"] == pytest.approx({"value": 0.0005, "low": 0.00025, "high": 0.001})
    wear = 0.1 * 500 / 3600
    assert told["per_1000_answers"]["money"] == pytest.approx({"value": 0.001 + wear, "low": 0.0005 + wear, "high": 0.002 + wear})
    assert (told["method"], told["currency"], told["answer_seconds"]) == ("wall meter", "CHF", 0.5)
    assert "AAA 2023, 100 g/kWh" in told["note"]


def test_the_world_is_weighted_by_generation_and_holes_are_left_out():
    tables = parse_tables(MIX, PARTS)
    assert tables.grams["WORLD"][0] == pytest.approx((3 * 100 + 1 * 500) / 4)
    assert "NUL" not in tables.grams
    assert tables.tdp == {"Intel Core i5-8250U": 15.0}


def test_without_the_table_a_country_is_unknown_and_never_made_up():
    nothing = Tables({}, {}, "no network")
    grams, note = carbon_intensity("DEU", nothing)
    assert grams is None
    assert "no network" in note
    told = cost_of_answers(Power("RAPL", 10.0, 9.0, 20.0, ""), 1.0, Cost(country="DEU"), nothing)
    assert told["per_1000_answers"]["kg_co2"] is None
    assert told["per_1000_answers"]["kwh"]["value"] > 0
    assert carbon_intensity("WORLD", nothing)[0] == 481.0


def test_an_unknown_country_names_the_nearest():
    with pytest.raises(FourscoreError, match=r"cost.country.*`AAB`.*AAA"):
        carbon_intensity("AAB", parse_tables(MIX, PARTS))


def test_the_published_tables_are_read_without_installing_them():
    tables = read_tables()
    assert tables.missing == ""
    assert len(tables.grams) > 200
    assert 20 < tables.grams["FRA"][0] < tables.grams["DEU"][0] < 900
    assert tables.grams["WORLD"][0] == pytest.approx(481.0, rel=0.01)  # Ember's figure for 2023, which is written down for offline use
    assert len(tables.tdp) > 4000
