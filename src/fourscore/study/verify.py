"""Was anything changed since it was measured, and does the verdict still follow from the items?"""

from __future__ import annotations

from pathlib import Path

from fourscore.files import FourscoreError, canonical_json, hash_file, read_json
from fourscore.model import base_sha256
from fourscore.spec import Study, read_study
from fourscore.study import environment, evidence, publish
from fourscore.study.graph import graph_of, losses_of, shipped_seed
from fourscore.study.inputs import Inputs, find_inputs
from fourscore.study.steps import RECORD, Context, Finished, result_hash, step_key
from fourscore.study.verdict import derive, read_arms


def verify(run: Path) -> list[str]:
    """Every fault found in a run folder, one line each; an empty list means it holds.

    Checks the chain of records, every output of every step, the published copies, the inputs (study file, base model, data source) and
    derives the verdict once more from the items. Raises FourscoreError when `run` is not a finished run.
    """
    if not (run / "evidence.jsonl").is_file():
        raise FourscoreError("not a run folder: it has no evidence.jsonl", where=str(run), todo="give the folder runs/<study>")
    wrong = evidence.check_chain(run)
    if wrong:
        return wrong
    study = read_study(run / "study.yaml")
    done, wrong = _behind_the_report(run)
    if wrong:
        return wrong
    for name, output, step in publish.places(done):
        path = run / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif hash_file(path) != step.record["outputs"][output]:
            wrong.append(f"{name}: changed since it was published")
    try:
        inputs = find_inputs(study)
    except FourscoreError as error:
        return [*wrong, str(error)]
    wrong += _check_inputs(study, inputs, done) + _check_graph(study, inputs, done)
    return wrong or _check_verdict(study, inputs, done)


def _behind_the_report(run: Path) -> tuple[dict[str, Finished], list[str]]:
    """The steps that the published report was made from, found by following the records' needs; and what is amiss with them."""
    folders = [run / "steps" / line["folder"] for line in evidence.read_chain(run)]
    records = [Finished(read_json(folder / RECORD)["step"], folder, read_json(folder / RECORD)) for folder in folders]
    page = run / "report.html"
    if not page.is_file():
        return {}, ["report.html: missing (the study is unfinished, or was begun anew)"]
    digest = hash_file(page)
    reports = [r for r in records if r.name == "report" and r.record["outputs"].get("report.html") == digest]
    if not reports:
        return {}, ["report.html: changed since it was published"]
    by_key = {r.record["key"]: r for r in records}
    done = {"report": reports[-1]}
    for name, needed in reports[-1].record["needs"].items():
        if needed["key"] not in by_key:
            return {}, [f"steps: the report was made from another {name} than the ones here"]
        done[name] = by_key[needed["key"]]
    return done, []


def _other_version(done: dict[str, Finished]) -> str:
    """What to say where the verdict was derived by another version than the one that checks it."""
    then, now = done["verdict"].record["environment"]["versions"], environment.versions()
    changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    return f" (derived by other versions: {', '.join(changed)})" if changed else ""


def _check_graph(study: Study, inputs: Inputs, done: dict[str, Finished]) -> list[str]:
    """Every record must belong to this study, follow from its outputs, and name the very steps that stand beside it."""
    wrong = []
    for step in graph_of(study, inputs):
        if step.name not in done:
            wrong.append(f"{step.name}: study.yaml asks for it, the report was made without it")
            continue
        record, folder = done[step.name].record, done[step.name].folder.name
        if canonical_json(record["settings"]) != canonical_json(dict(step.settings)):
            wrong.append(f"steps/{folder}: was made with other settings than study.yaml has")
        if record["result"] != result_hash(step, record["outputs"]):
            wrong.append(f"steps/{folder}: its result hash does not follow from its outputs")
        if record["key"] != step_key(step, done, record["environment"]):
            wrong.append(f"steps/{folder}: its key does not follow from what it was made from")
    return wrong


def _check_inputs(study: Study, inputs: Inputs, done: dict[str, Finished]) -> list[str]:
    wrong = []
    if inputs.base_sha256 != read_json(done["base"].folder / "base.json")["sha256"]:
        wrong.append(f"base model {study.model.name}: its files are not the ones that were measured")
    if inputs.source_sha256 != read_json(done["data"].folder / "check.json")["sha256"]:
        wrong.append(f"{study.data.source}: changed since it was read")
    own = read_json(done["verdict"].folder / "verdict.json")["shipped"].get("base_sha256")
    if own and base_sha256(done["residual"].folder / "base") != own:
        wrong.append("base: not the one that the adapter was trained and measured on")
    return wrong


def _check_verdict(study: Study, inputs: Inputs, done: dict[str, Finished]) -> list[str]:
    folders = {name: step.folder for name, step in done.items()}
    context = Context("verify", study, inputs.base, Path(), folders, Path())
    again = derive(study, read_arms(study, folders), losses_of(context), shipped_seed(context))
    if canonical_json(again) != canonical_json(read_json(done["verdict"].folder / "verdict.json")):
        return ["verdict.json: does not follow from the items" + _other_version(done)]
    return []
