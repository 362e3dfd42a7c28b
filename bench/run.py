"""All benches one after another on a quiet machine, and the goals beside what was measured.

    python bench/run.py                     # about 25 minutes on two cores; writes bench/results/<bench>.json
    python bench/run.py --quick             # about 4 minutes, fewer turns; writes build/bench/<bench>.json
    python bench/run.py --only nf4_kernels  # one of them (can be given more than once)
    python bench/run.py --only train_loss   # runs on request only: 25 minutes; the table shows the kept result otherwise

`make bench` runs it in an environment of its own, in which the peers are pinned. Before, between and after the benches it
takes the machine's load, which every result carries; where another program keeps a core busy it refuses (`--force` goes on).
What a bench prints goes to build/bench/<bench>.log. A bench that fails, or is not there, is a row of the table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quiet
from goals import FOLDER, RESULTS, Goal, figure, read_goals

from fourscore.files import FourscoreError, read_json, write_json
from fourscore.machine import describe_machine
from fourscore.progress import duration, track

SCRATCH = FOLDER.parent / "build" / "bench"
PACKAGES = ("fourscore", "torch", "bitsandbytes", "peft", "transformers", "lm_eval", "numpy")
PATIENCE = 3.0  # a bench that takes so many times what was expected is stopped


@dataclass(frozen=True)
class Bench:
    """bench/<name>.py: the options of a full and of a quick run, and what each takes in seconds on two cores of a server.

    {threads} is the number of threads, {out} the file that the bench writes.
    """

    name: str
    full: str
    quick: str
    seconds: tuple[float, float]
    on_request: bool = False  # run only when named: long, and not a timing, so its kept result needs no quiet machine

    def expected(self, quick: bool) -> float:
        return self.seconds[quick]

    def command(self, quick: bool, **words: str) -> list[str]:
        options = (self.quick if quick else self.full).split()
        return [sys.executable, str(FOLDER / f"{self.name}.py"), *(option.format(**words) for option in options)]


BENCHES = (
    Bench("nf4_kernels", "--threads {threads} --json {out}", "--quick --threads {threads} --json {out}", (180, 60)),
    Bench(
        "train_step",
        "--cases all answer 1b --busy --rounds 3 --threads {threads} --out {out}",
        "--cases all --busy --rounds 1 --steps 1 --threads {threads} --out {out}",
        (780, 100),
    ),
    Bench("loading", "--threads {threads} --out {out}", "--quick --threads {threads} --out {out}", (300, 40)),
    Bench("scoring", "--threads {threads} --json {out}", "--quick --threads {threads} --json {out}", (240, 60)),
    Bench("train_loss", "--threads {threads} --out {out}", "--quick --threads {threads} --out {out}", (1500, 90), on_request=True),
)


@dataclass(frozen=True)
class Outcome:
    """How one bench ended: its record, or why there is none."""

    bench: Bench
    record: dict[str, Any] | None
    fault: str = ""


def run(bench: Bench, quick: bool, threads: int, log: Path, out: Path) -> Outcome:
    """One bench in a process of its own."""
    words = {"threads": str(threads), "out": str(out)}
    if not (FOLDER / f"{bench.name}.py").exists():
        return Outcome(bench, None, f"bench/{bench.name}.py is not there")
    command, expected = bench.command(quick, **words), bench.expected(quick)
    log.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    others, began = quiet.Others(), time.monotonic()
    with open(log, "w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True)
        code = _wait(process, bench.name, expected)
    busy, seconds = others.busy(), time.monotonic() - began
    if code is None:
        return Outcome(bench, None, f"stopped after {duration(seconds)}, {duration(expected)} were expected; see {log}")
    if code:
        return Outcome(bench, None, f"exit code {code}: {_last_line(log)}; see {log}")
    try:
        record = read_json(out)
    except FourscoreError:
        return Outcome(bench, None, f"it ended well and wrote no result; see {log}")
    shown = [os.path.relpath(word, FOLDER.parent) if word.startswith(str(FOLDER)) else word for word in command[1:]]
    record["run"] = {
        "command": " ".join(word for word in shown if word != words["out"]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine().to_json(),
        "versions": _versions(),
        "threads": threads,
        "quick": quick,
        "seconds": round(seconds, 1),
        "others_busy_cores": round(busy, 3),
    }
    return Outcome(bench, record)


def _wait(process: subprocess.Popen[bytes], name: str, expected: float) -> int | None:
    """The exit code; None where the bench had to be stopped. It and its children end when this program does."""
    try:
        with track(name, expected, "s of those expected") as bar:
            for _ in range(int(PATIENCE * expected) + 60):
                try:
                    return process.wait(1.0)
                except subprocess.TimeoutExpired:
                    bar.advance(1.0)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing was printed"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def load(threads: int) -> dict[str, Any]:
    """`quiet.load`, in a process of its own: this one stays small and without threads."""
    command = [sys.executable, str(FOLDER / "quiet.py"), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def refusal(measured: dict[str, Any]) -> FourscoreError | None:
    """The error where other programs keep a core busy."""
    busy = measured["others_busy_cores"]
    if busy < quiet.BUSY:
        return None
    return FourscoreError(
        f"other programs keep {busy:.1f} cores busy: timings would be of them, not of the kernels",
        todo="wait until they have ended (`top` shows them), or go on with --force; the result will say so",
    )


def kept_results(chosen: list[Bench]) -> list[Outcome]:
    """Benches that run on request and did not now: the result that is kept, or that there is none."""
    kept = []
    for bench in (b for b in BENCHES if b.on_request and b not in chosen):
        try:
            kept.append(Outcome(bench, read_json(RESULTS / f"{bench.name}.json")))
        except FourscoreError:
            kept.append(Outcome(bench, None, f"not run; `bench/run.py --only {bench.name}` takes about {duration(bench.seconds[0])}"))
    return kept


def table(goals: list[Goal], outcomes: list[Outcome]) -> str:
    """What was promised, beside what was measured; benches without a result have a line of their own."""
    lines = [f"{'what':62} {'peer':42} {'goal':>10} {'measured':>12}  met"]
    for outcome in outcomes:
        if outcome.record is None:
            lines.append(f"{outcome.bench.name}: no result: {outcome.fault}")
            continue
        for goal in (g for g in goals if g.bench == outcome.bench.name):
            value = goal.measured(outcome.record)
            word = "" if value is None else "yes" if goal.met(value) else "NO"
            bound = f"{'>=' if goal.better == 'more' else '<='} {figure(goal.goal, goal.unit)}"
            lines.append(f"{goal.name:62} {goal.peer:42} {bound:>10} {figure(value, goal.unit):>12}  {word}")
    return "\n".join(lines)


def main() -> int:
    """0 when every bench gave a result (goals missed are results too), else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[b.name for b in BENCHES], metavar="NAME", help="this bench; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer turns: a look, not a result")
    parser.add_argument("--force", action="store_true", help="also while other programs keep cores busy")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results, with --quick build/bench)")
    options = parser.parse_args()
    folder = options.out or (SCRATCH if options.quick else RESULTS)
    chosen = [b for b in BENCHES if (b.name in options.only if options.only else not b.on_request)]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # the bench under way ends with this program

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    before = load(options.threads)
    note(f"load: {json.dumps(before)}")
    refused = refusal(before)
    if refused and not options.force:
        note(str(refused))
        return 1
    if refused or before["others_busy_cores"] >= quiet.SHARED:
        note(f"warning: other programs take {before['others_busy_cores']:.2f} cores; the results say so")
    note(f"{len(chosen)} benches, about {duration(sum(b.expected(options.quick) for b in chosen))}")
    outcomes = []
    for number, bench in enumerate(chosen, 1):
        note(f"[{number}/{len(chosen)}] {bench.name}: about {duration(bench.expected(options.quick))}")
        outcome = run(bench, options.quick, options.threads, SCRATCH / f"{bench.name}.log", SCRATCH / f"{bench.name}.part.json")
        after = load(options.threads)
        if outcome.record is None:
            note(f"{bench.name}: {outcome.fault}")
        else:
            outcome.record["run"] |= {"load_before": before, "load_after": after}
            write_json(folder / f"{bench.name}.json", outcome.record)
        outcomes.append(outcome)
        before = after
    print(table(read_goals(), outcomes + kept_results(chosen)))
    note(f"results: {folder}")
    return 0 if all(outcome.record for outcome in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FourscoreError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the results of finished benches are kept")
