"""Was anything changed since it was measured, and does the verdict still follow from the items?"""

from __future__ import annotations

from pathlib import Path

from fourscore.files import FourscoreError, canonical_json, hash_file, read_json
from fourscore.spec import Study, read_study
from fourscore.study import environment, evidence, publish
from fourscore.study.graph import graph_of
from fourscore.study.steps import RECORD, Finished, result_hash


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
    done = _latest(run, study)
    missing = [step.name for step in graph_of(study) if step.name not in done]
    if missing:
        return [f"unfinished: {', '.join(missing)} (or study.yaml was changed since)"]
    wrong += _check_graph(study, done)
    for name, output, step in publish.places(done):
        path = run / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif hash_file(path) != step.record["outputs"][output]:
            wrong.append(f"{name}: changed since it was published")
    wrong += _check_inputs(study, done)
    return wrong or _check_verdict(study, done)


def _other_version(done: dict[str, Finished]) -> str:
    """What to say where the verdict was derived by another version than the one that checks it."""
    then, now = done["verdict"].record["environment"]["versions"], environment.versions()
    changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    return f" (derived by other versions: {', '.join(changed)})" if changed else ""


def _latest(run: Path, study: Study) -> dict[str, Finished]:
    """The newest chained record of each step whose settings are those of the study file."""
    settings = {step.name: dict(step.settings) for step in graph_of(study)}
    done: dict[str, Finished] = {}
    for line in evidence.read_chain(run):
        folder = run / "steps" / line["folder"]
        record = read_json(folder / RECORD)
        if canonical_json(record["settings"]) == canonical_json(settings.get(line["step"])):
            done[line["step"]] = Finished(line["step"], folder, record)
    return done


def _check_graph(study: Study, done: dict[str, Finished]) -> list[str]:
    """Every record must name the results of the very steps that stand beside it."""
    wrong = []
    for step in graph_of(study):
        record = done[step.name].record
        if record["result"] != result_hash(step, record["outputs"]):
            wrong.append(f"steps/{done[step.name].folder.name}: its result hash does not follow from its outputs")
        for name, needed in record["needs"].items():
            if needed["result"] != done[name].result_hash:
                wrong.append(f"steps/{done[step.name].folder.name}: was made from another {name}")
    return wrong


def _check_inputs(study: Study, done: dict[str, Finished]) -> list[str]:
    from fourscore.data.sources import read_source
    from fourscore.model import base_sha256
    from fourscore.study.graph import base_folder

    wrong = []
    try:
        if base_sha256(base_folder(study)) != read_json(done["base"].folder / "base.json")["sha256"]:
            wrong.append(f"base model {study.model.name}: its files are not the ones that were measured")
        if read_source(study.data.source, study.data.sha256).sha256 != read_json(done["data"].folder / "check.json")["sha256"]:
            wrong.append(f"{study.data.source}: changed since it was read")
    except FourscoreError as error:
        wrong.append(str(error))
    return wrong


def _check_verdict(study: Study, done: dict[str, Finished]) -> list[str]:
    from fourscore.study.graph import losses_of, shipped_seed
    from fourscore.study.steps import Context
    from fourscore.study.verdict import derive, read_arms

    folders = {name: step.folder for name, step in done.items()}
    context = Context("verify", study, Path(), folders, Path())
    again = derive(study, read_arms(study, folders), losses_of(context), shipped_seed(context))
    if canonical_json(again) != canonical_json(read_json(done["verdict"].folder / "verdict.json")):
        return ["verdict.json: does not follow from the items" + _other_version(done)]
    return []
