"""Are the bounds what they say? Simulated studies through the shipped code, and exact enumeration where that is possible.

    python bench/stats_simulation.py                  # 10,000 studies a case, about four minutes on two free cores
    python bench/stats_simulation.py --studies 500    # a quick look; writes nothing

Writes bench/results/statistics.json and the tables between the markers of docs/statistics.md. (Not called statistics.py:
a script's folder comes first on sys.path, where that name would hide the standard library's module from its neighbours.)
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from fourscore.files import atomic_file, write_json
from fourscore.stats.clusters import Array, Grouping, grouping
from fourscore.stats.paired import paired_bounds
from fourscore.stats.power import smallest_effect_before
from fourscore.stats.score import score_low

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE = 0.95
CHUNK = 1000  # studies at a time: 1,000 x 1,000 items are 8 MB


@dataclass(frozen=True)
class Case:
    """One kind of study. `difference` is the truth, P(a only) - P(b only) for 0/1 scores; graded scores scale it.

    `model` says how items of a cluster hang together, at intra-cluster correlation `correlation` (for 'hot': the share of
    clusters in which the arms differ at all): 'copied' (an item takes its cluster's one outcome or draws its own: whole
    clusters flip together), 'dirichlet' (each cluster has rates of its own), 'hot'. Two groupings: 'copied', crossed at random.
    """

    family: str
    items: int
    clusters: tuple[int, ...]
    sizes: str  # equal, skewed (Zipf, exponent 0.7), one large (30% of the items)
    model: str
    correlation: tuple[float, ...]
    discordance: float
    difference: float
    scores: str = "binary"  # binary; graded (discordant items differ by 0.1 to 1); noisy (every item differs a little)


def sizes(items: int, count: int, kind: str) -> Array:
    """Cluster sizes that add up to `items`, each at least 1."""
    weight = {"equal": np.ones(count), "skewed": np.arange(1, count + 1) ** -0.7, "one large": np.ones(count)}[kind]
    if kind == "one large":
        weight[0] = 0.3 / 0.7 * (count - 1)
    m = np.maximum(1, np.floor(weight / weight.sum() * items)).astype(np.int64)
    while m.sum() != items:
        m[np.argmin(m / weight) if m.sum() < items else np.argmax(m)] += 1 if m.sum() < items else -1
    return m


def layout(case: Case) -> tuple[tuple[Grouping, ...], list[Array]]:
    """The groupings that the statistics see, and each grouping's codes for drawing. The crossing is fixed for a case."""
    if not case.clusters:
        return (), []
    codes = [np.repeat(np.arange(c), sizes(case.items, c, case.sizes)) for c in case.clusters]
    if len(codes) == 1:
        return (grouping(codes[0].tolist()),), codes
    codes[1] = np.random.default_rng(7).permutation(codes[1])
    crossing = grouping(list(zip(codes[0].tolist(), codes[1].tolist(), strict=True)))
    return (*(grouping(c.tolist()) for c in codes), crossing), codes


def _outcomes(rng: np.random.Generator, shape: tuple[int, ...], up: Any, down: Any) -> Array:
    u = rng.random(shape, dtype=np.float32)
    return (u < up).astype(np.int8) - ((u >= up) & (u < up + down)).astype(np.int8)


def draw(case: Case, codes: list[Array], studies: int, rng: np.random.Generator) -> Array:
    """Differences a - b of `studies` studies: [studies, items] f64, mean `truth(case)`."""
    shape = (studies, case.items)
    up, down = (case.discordance + case.difference) / 2, (case.discordance - case.difference) / 2
    if case.model == "dirichlet" and case.clusters:
        scale = 1 / case.correlation[0] - 1
        gammas = [rng.standard_gamma(max(scale * p, 1e-9), (studies, case.clusters[0])) for p in (up, down, 1 - up - down)]
        total = np.maximum(sum(gammas), 1e-300)
        d = _outcomes(rng, shape, (gammas[0] / total)[:, codes[0]], (gammas[1] / total)[:, codes[0]])
    elif case.model == "hot" and case.clusters:
        hot = (rng.random((studies, case.clusters[0])) < case.correlation[0])[:, codes[0]]
        d = np.where(hot, _outcomes(rng, shape, up / case.correlation[0], down / case.correlation[0]), 0)
    else:
        d = _outcomes(rng, shape, up, down)
        if any(case.correlation):
            chooser, past = rng.random(shape, dtype=np.float32), 0.0
            for code, count, rho in zip(codes, case.clusters, case.correlation, strict=True):
                shared = _outcomes(rng, (studies, count), up, down)[:, code]
                d = np.where((chooser >= past) & (chooser < past + rho**0.5), shared, d)
                past += rho**0.5
    if case.scores == "graded":
        return d * rng.uniform(0.1, 1.0, shape)
    if case.scores == "noisy":
        return 0.5 * d + rng.uniform(-0.3, 0.3, shape)
    return d.astype(np.float64)


def truth(case: Case) -> float:
    return case.difference * {"binary": 1.0, "graded": 0.55, "noisy": 0.5}[case.scores]


def run(case: Case, studies: int, number: int) -> dict[str, Any]:
    """Coverage of both bounds, and how often a gate standing exactly at the truth would falsely PASS (low above the truth)."""
    groups, codes = layout(case)
    rng, true = np.random.default_rng([20_251, number]), truth(case)
    low_covers = high_covers = passes = 0
    width = 0.0
    done = 0
    while done < studies:
        batch = min(CHUNK, studies - done)
        found = paired_bounds(draw(case, codes, batch, rng), groups, CONFIDENCE)
        low_covers += int((found.low <= true + 1e-9).sum())
        high_covers += int((found.high >= true - 1e-9).sum())
        passes += int((found.low > 0).sum())
        width += float((found.high - found.low).sum())
        done += batch
    effective = min((g.effective for g in groups[:2]), default=float(case.items))
    return {
        **asdict(case),
        "truth": true,
        "effective_clusters": round(effective, 1),
        "studies": studies,
        "cover_low": low_covers / studies,
        "cover_high": high_covers / studies,
        "false_pass": 1 - low_covers / studies,
        "pass_superiority": passes / studies,
        "width": width / studies,
    }


def coverage_cases() -> list[Case]:
    cases = []
    kinds = [(0.02, -0.02), (0.1, 0.0), (0.1, -0.05), (0.1, -0.1), (0.4, 0.0), (0.4, -0.15)]
    for n in (5, 10, 20, 50, 100, 300, 600, 1000):
        cases += [Case("unclustered", n, (), "equal", "copied", (), p, d) for p, d in [*kinds, (0.9, -0.8)]]
    small = [(20, 5, "equal"), (40, 10, "skewed"), (100, 10, "one large"), (100, 4, "equal"), (200, 20, "equal"), (200, 20, "skewed")]
    large = [
        (300, 40, "equal"),
        (600, 60, "equal"),
        (1000, 100, "equal"),
        (300, 40, "skewed"),
        (600, 60, "skewed"),
        (1000, 50, "one large"),
    ]
    for family, layouts in (("few clusters", small), ("40 clusters and more", large)):
        for n, g, kind in layouts:
            cases += [Case(family, n, (g,), kind, "copied", (r,), p, d) for r in (0.0, 0.1, 0.3, 0.8) for p, d in kinds]
    for n, g, kind in [(200, 20, "equal"), (300, 40, "equal"), (600, 60, "skewed")]:
        for model, r in (("dirichlet", 0.1), ("dirichlet", 0.5), ("hot", 0.4)):
            cases += [Case("other correlation", n, (g,), kind, model, (r,), p, d) for p, d in kinds if p < 0.4 or model != "hot"]
    for n, g, kind in [
        (100, (10, 10), "equal"),
        (300, (40, 40), "equal"),
        (300, (40, 60), "skewed"),
        (600, (60, 120), "equal"),
        (600, (120, 60), "skewed"),
        (1000, (40, 400), "equal"),
    ]:
        for rho in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.25, 0.2)):
            cases += [Case("two-way", n, g, kind, "copied", rho, p, d) for p, d in kinds]
    for scores in ("graded", "noisy"):
        for n, g, rho in [
            (20, (), ()),
            (100, (10,), (0.1,)),
            (300, (), ()),
            (300, (40,), (0.0,)),
            (300, (40,), (0.3,)),
            (600, (60, 120), (0.1, 0.1)),
        ]:
            cases += [Case("graded scores", n, g, "equal", "copied", rho, p, d, scores) for p, d in kinds]
    return cases


def power_cases() -> list[Case]:
    """Designs with the difference that `smallest_effect_before` names for them: a superiority gate should pass 80% of them."""
    cases = []
    for n, g, rho, p in [
        (300, (), (), 0.2),
        (600, (), (), 0.1),
        (1000, (), (), 0.3),
        (300, (40,), (0.1,), 0.2),
        (600, (60,), (0.1,), 0.2),
        (600, (60,), (0.3,), 0.3),
        (600, (200,), (0.2,), 0.15),
        (600, (60, 120), (0.1, 0.1), 0.3),
        (1000, (100,), (0.05,), 0.1),
    ]:
        effect = smallest_effect_before(n, g or None, p, rho or 0.0, CONFIDENCE)
        cases.append(Case("power", n, g, "equal", "copied", rho, max(p, effect), effect))
    return cases


def exact(items: int, confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Coverage of the lower bound for `items` independent 0/1 pairs, by enumerating every pair of counts; no simulation.

    Grid: both expected counts from 0 to 60, finer below 13 (the bound moves in steps there). The upper bound mirrors it.
    """
    most = min(items, 110) + 1
    b, c = np.arange(most)[:, None], np.arange(most)[None, :]
    possible = b + c <= items
    rest = np.maximum(items - b - c, 0)
    ways = np.where(
        possible, special.gammaln(items + 1) - special.gammaln(b + 1) - special.gammaln(c + 1) - special.gammaln(rest + 1), -np.inf
    )
    gain, loss = np.where(possible, b / items, 0), np.where(possible, c / items, 0)
    # What information() gives for independent pairs: n - 1, or n where no pair differs.
    n = np.where(b + c > 0, np.where(gain + loss - (gain - loss) ** 2 > 0, items - 1.0, items), items)
    low = score_low(gain, loss, n, special.stdtrit(items - 1, confidence), corrected=True)
    few = [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, *np.arange(1, 13, 0.09), *np.arange(13, 60, 1.7)]
    other = [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 2, 3, 5, 8, 15, 25]
    bands: dict[str, list[tuple[float, float, float]]] = {"0-3": [], "3-8": [], "8-15": [], "15-30": [], "30-60": []}
    for x, y in [pair for f in few for o in other for pair in ((f, o), (o, f))]:
        if x + y >= min(items, 60):
            continue
        p, q = x / items, y / items
        probability = np.exp(ways + special.xlogy(b, p) + special.xlogy(c, q) + special.xlogy(rest, 1 - p - q))
        covered = float(probability[low <= p - q + 1e-9].sum() + max(0.0, 1 - probability.sum()))
        band = next(name for name in bands if x + y < float(name.split("-")[1]))
        bands[band].append((covered, float(x), float(y)))
    return {
        "items": items,
        "confidence": confidence,
        "bands": {
            name: {"lowest": min(rows)[0], "at_gains_losses": list(min(rows)[1:]), "highest": max(rows)[0]}
            for name, rows in bands.items()
            if rows
        },
    }


def qualifies(row: dict[str, Any]) -> bool:
    """Where the interval promises coverage within one point: see docs/statistics.md, 'What is promised'."""
    rho = row["correlation"] if row["model"] != "hot" else ()
    counts = row["clusters"]
    design = 1 + sum((row["items"] / c - 1) * r for c, r in zip(counts, rho, strict=False))
    informative = row["items"] / design * (row["discordance"] - row["difference"] ** 2)
    return bool(
        row["items"] >= 300
        and min(counts, default=40) >= 40
        and row["effective_clusters"] >= 35
        and row["model"] != "hot"
        and informative >= 60
    )


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _line(row: dict[str, Any]) -> str:
    clusters = " x ".join(str(c) for c in row["clusters"]) or "none"
    rho = ", ".join(f"{r:g}" for r in row["correlation"]) or "0"
    how = "" if row["model"] == "copied" else f" {row['model']}"
    scores = "" if row["scores"] == "binary" else f", {row['scores']}"
    sizes_of = "" if row["sizes"] == "equal" else f", {row['sizes']}"
    cells = [f"{row['items']}{scores}", f"{clusters}{sizes_of}", f"{rho}{how}", f"{row['discordance']:g}", f"{row['truth']:+.3g}"]
    cells += [_percent(row[name]) for name in ("cover_low", "cover_high", "false_pass")]
    return "| " + " | ".join([*cells, f"{row['width']:.3f}"]) + " |"


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/statistics.md."""
    rows = result["coverage"]
    out = ["### Independent pairs, exactly", "", "Lowest and highest coverage (%) by expected number of discordant pairs; nominal 95.", ""]
    bands = ["0-3", "3-8", "8-15", "15-30", "30-60"]
    out += ["| items | " + " | ".join(bands) + " |", "|" + "---|" * (len(bands) + 1)]
    for row in result["exact"]:
        if row["confidence"] == CONFIDENCE:
            cells = [row["bands"].get(band) for band in bands]
            out.append(
                f"| {row['items']} | "
                + " | ".join(f"{_percent(c['lowest'])} to {_percent(c['highest'])}" if c else "" for c in cells)
                + " |"
            )
    out += [
        "",
        "### In short",
        "",
        f"{result['studies']:,} studies a case; one standard error is {100 * (0.95 * 0.05 / result['studies']) ** 0.5:.2f} points.",
        "",
    ]
    out += ["| family | cases | lowest coverage, lower bound | upper bound | highest false PASS, gain (true 0) | keep (true = -margin) |"]
    out.append("|" + "---|" * 6)
    families = list(dict.fromkeys(r["family"] for r in rows))
    for label, chosen in [(f, [r for r in rows if r["family"] == f]) for f in families] + [
        ("promised within one point", [r for r in rows if qualifies(r)])
    ]:
        low, high = min(r["cover_low"] for r in chosen), min(r["cover_high"] for r in chosen)
        gain = max(r["false_pass"] for r in chosen if r["truth"] == 0)
        keep = max(r["false_pass"] for r in chosen if r["truth"] < 0)
        out.append(f"| {label} | {len(chosen)} | {_percent(low)} | {_percent(high)} | {_percent(gain)} | {_percent(keep)} |")
    chosen = [r for r in rows if qualifies(r)]
    most = max(max(r["cover_low"], r["cover_high"]) for r in chosen)
    out += ["", f"Highest coverage where one point is promised: {_percent(most)}%.", "", "### Power against plan", ""]
    out += [
        "| items | clusters | correlation | discordance | planned effect | planned power | simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["power"]:
        clusters = " x ".join(str(c) for c in r["clusters"]) or "none"
        rho = ", ".join(f"{c:g}" for c in r["correlation"]) or "0"
        out.append(
            f"| {r['items']} | {clusters} | {rho} | {r['discordance']:g} | {r['truth']:.3f} | 80 | {_percent(r['pass_superiority'])} |"
        )
    head = "| items | clusters | correlation | discordance | true difference | lower covers | upper covers | false PASS | width |"
    for family in families:
        out += ["", f"### {family[:1].upper()}{family[1:]}", "", head, "|" + "---|" * 9]
        out += [_line(r) for r in rows if r["family"] == family]
    return "\n".join(out)


def _timed(job: tuple[int, Case], studies: int) -> dict[str, Any]:
    return run(job[1], studies, job[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000, help="studies a case; fewer than 10,000 write nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    coverage, power = coverage_cases(), power_cases()
    with ProcessPoolExecutor(options.processes) as pool:
        enumerated = pool.map(exact, (5, 10, 20, 40, 100, 300, 1000))
        results = list(pool.map(partial(_timed, studies=options.studies), enumerate(coverage + power), chunksize=4))
        result = {
            "confidence": CONFIDENCE,
            "studies": options.studies,
            "exact": list(enumerated),
            "coverage": results[: len(coverage)],
            "power": results[len(coverage) :],
        }
    text = tables(result)
    print(text)
    print(f"\n{len(results)} cases in {time.perf_counter() - start:.0f} s")
    if options.studies >= 10_000:
        write_json(ROOT / "bench/results/statistics.json", result)
        page = ROOT / "docs/statistics.md"
        before, rest = page.read_text(encoding="utf-8").split("<!-- simulation: begin -->\n")
        after = rest.split("<!-- simulation: end -->")[1]
        with atomic_file(page) as file:
            file.write(f"{before}<!-- simulation: begin -->\n{text}\n<!-- simulation: end -->{after}")


if __name__ == "__main__":
    main()
