"""report.html: nothing fetched, nothing executed, everything there, the same bytes every time; and its words and numbers."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import lxml.html
import pytest

from fourscore import report
from fourscore.files import read_json
from fourscore.report import wording

LOADS = {"src", "srcset", "href", "xlink:href", "data", "action", "formaction", "poster", "background", "cite", "ping", "manifest"}


def page_of(run: Path) -> lxml.html.HtmlElement:
    return lxml.html.fromstring((run / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["passing", "hostile"])
def test_nothing_is_fetched_or_executed(name: str, request: pytest.FixtureRequest) -> None:
    page = page_of(request.getfixturevalue(name))
    active = {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "foreignobject", "audio", "video", "use", "a"}
    for element in page.iter():
        assert element.tag not in active, element.tag
        for attribute, value in element.attrib.items():
            assert not attribute.startswith("on")
            assert attribute not in LOADS or value.startswith("#"), (element.tag, attribute, value)
            assert "javascript:" not in value
            assert not re.search(r"url\((?!#)", value)
    for style in page.iter("style"):
        assert not re.search(r"@import|@font-face|url\(", style.text)
    policy = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_markup_in_data_is_shown_as_text(hostile: Path) -> None:
    text = page_of(hostile).text_content()
    assert text.count("<script>alert('x')</script>") >= 5  # purpose, rows, answers, warnings, a chart's label
    assert "{{ 7*7 }}" in text


def test_every_gate_is_drawn_and_explained(passing: Path) -> None:
    page, told = page_of(passing), read_json(passing / "report.json")
    text = page.text_content()
    assert len(told["gates"]) == 6
    for gate in told["gates"]:
        assert gate["reading"] in text
        assert any(gate["title"] in "".join(svg.itertext()) for svg in page.iter("svg")), gate["title"]
    assert len(page.xpath("//div[contains(@class, 'gate ')]")) == 6


def test_sections_stand_in_order_and_headings_do_not_skip(passing: Path) -> None:
    page = page_of(passing)
    assert [h.get("id") for h in page.iter("h2")] == [
        "before-after", "gates", "worth", "plan", "sizes", "training", "answers", "data", "gaps", "again",
    ]  # fmt: skip
    levels = [int(h.tag[1]) for h in page.iter("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for chart in page.xpath("//div[@role='img']"):
        assert len(chart.get("aria-label")) > 20
    for box in page.xpath("//div[@class='scroll']"):
        assert box.get("tabindex") == "0"
        assert box.get("aria-label")
    ids = page.xpath("//@id")
    assert len(ids) == len(set(ids))


def test_the_note_on_the_base_stands_at_the_top(passing: Path) -> None:
    header = page_of(passing).find(".//header").text_content()
    assert "stored in 4 bits (Q4_1) once" in header
    assert "Apache-2.0" in header
    assert "CC-BY-SA-4.0" in header


def test_same_run_same_bytes(passing: Path, tmp_path: Path) -> None:
    report.write(passing, tmp_path)
    for name in ("report.json", "report.html", "model-card.md"):
        assert (tmp_path / name).read_bytes() == (passing / name).read_bytes()


def test_colours_are_readable_on_their_paper() -> None:
    """WCAG 2.1: text wants a contrast of 4.5 to its background, in both schemes."""
    style = (Path(report.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark, printed = (
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    for scheme in (light, dark, printed):
        for name in ("ink", "muted", "pass", "fail", "inconclusive"):
            assert _contrast(scheme[name], scheme["paper"]) >= 4.5, (name, scheme["paper"])


def _contrast(one: str, two: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_chart_colours_all_follow_the_scheme(passing: Path) -> None:
    html = (passing / "report.html").read_text(encoding="utf-8")
    drawn = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{3,6})"', html))
    mapped = set(re.findall(r'\.chart \[(?:fill|stroke)="(#[0-9a-f]{6})"\]', html))
    assert drawn
    assert drawn <= mapped


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.digits(0.0021345, 2), "0.0021"),
        (wording.digits(1234.5), "1,234"),
        (wording.size(269_060_552), "269 MB"),
        (wording.size(1_310_000_000), "1.31 GB"),
        (wording.seconds(0.0225), "22.5 ms"),
        (wording.seconds(345), "5 min 45 s"),
        (wording.percent(0.92333), "92.3%"),
        (wording.points(-0.0004), "+0.0"),
        (wording.points(-0.021), "\N{MINUS SIGN}2.1"),
        (wording.energy(0.0094), "9.4 Wh"),
        (wording.money(0.00214, "EUR"), "0.0021 EUR"),
        (wording.allowance(0.05), "5 points"),
        (wording.size(None), "\N{EM DASH}"),
    ],
)
def test_numbers_have_sensible_digits(shown: str, expected: str) -> None:
    assert shown == expected
