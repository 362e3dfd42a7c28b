"""report.json from the files of a run folder. Knows file names and fields; knows nothing of pages.

`study.yaml` and `verdict.json` must be there. Whatever else is missing is named under `not_measured`; nothing is filled in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from fourscore.files import FourscoreError, hash_file, read_json, read_jsonl
from fourscore.report import wording
from fourscore.report.answers import compare_answers, share_by_answer
from fourscore.report.schema import (
    Answers,
    AnswerShare,
    ArmResult,
    BaseModelFacts,
    Comparison,
    DataFacts,
    Estimate,
    Floor,
    Gap,
    Gate,
    Prediction,
    Purpose,
    Recipe,
    Report,
    Reproduce,
    Shipped,
    StudyCost,
    TrainingRun,
    Verdict,
)
from fourscore.spec import Study, read_study

T = TypeVar("T", bound=BaseModel)
OWN_BASE = "the adapter's own base"

ABSENT_HERE = (
    Gap(what="Safety", why="Whether the tuned model refuses what it should, or can be talked out of it. This version has no such test."),
    Gap(what="Bias", why="Whether it treats groups of people differently. This version has no such test."),
    Gap(what="Memorisation", why="Whether it repeats private text of the training data. This version has no such test."),
    Gap(what="Many users at once", why="Waiting times were taken one request at a time, not on a server under load."),
)


def assemble(run: str | Path) -> dict[str, Any]:
    """The content of report.json. Raises FourscoreError where a file of the run is missing or not as agreed."""
    run = Path(run)
    study = read_study(run / "study.yaml")
    told = read_json(run / "verdict.json")
    records = _current_records(run)
    gaps: list[Gap] = []
    check = _optional(run / "check.json", gaps, "The data check", "check.json is not in the run folder.")
    plan = _optional(run / "plan.json", gaps, "Predictions", "No plan was made before the run (plan.json is not there).")
    trivial = (check or {}).get("trivial_answer")
    shipped = _read(Shipped, told["shipped"], run / "verdict.json") if told.get("shipped") else None
    gates = [_gate(g, trivial, run) for g in told.get("gates", [])]
    arms = _arms(run, study, shipped, gaps)
    training = _training(run, study, shipped, gaps)
    model, base_sha256 = _model(run, study, records)
    cost = _cost(arms, records, training)
    answers, by_answer = _answers(run, shipped, records, study.data.choices, gaps)
    head, advice = wording.headline(told["verdict"], [g.model_dump() for g in gates], trivial)
    _name_gaps(gaps, arms, told, model, check)
    _name_resumed(gaps, records)
    report = Report(
        verdict=Verdict(verdict=told["verdict"], headline=head, advice=advice, sentence=told.get("sentence", ""), shipped=shipped),
        study=Purpose(
            name=study.study,
            purpose=study.purpose,
            digest=study.digest(),
            confidence=study.evaluate.confidence,
            choices=study.data.choices,
            settings=study.model_dump(mode="json"),
        ),
        model=model,
        data=_read(DataFacts, check, run / "check.json") if check else None,
        arms=arms,
        gates=gates,
        explain=[_read(Comparison, row, run / "verdict.json") for row in told.get("explain", [])],
        recipe=[_read(Recipe, row, run / "verdict.json") for row in told.get("recipe", [])],
        floor=[_read(Floor, row, run / "verdict.json") for row in told.get("floor", [])],
        training=training,
        predictions=_predictions(plan, arms, training, records, cost),
        plan_warnings=list((plan or {}).get("warnings", [])),
        cost=cost,
        answers=answers,
        by_answer=by_answer,
        not_measured=[*gaps, *ABSENT_HERE],
        reproduce=_reproduce(run, study, plan, check, shipped, records, base_sha256),
    )
    return report.model_dump(mode="json")


def _read(kind: type[T], value: Any, path: Path) -> T:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FourscoreError(
            f"not as agreed: `{place}`: {first['msg']}", where=str(path), todo="run the step that writes it again with this version"
        ) from None


def _optional(path: Path, gaps: list[Gap], what: str, why: str) -> Any:
    if path.is_file():
        return read_json(path)
    gaps.append(Gap(what=what, why=why))
    return None


def _current_records(run: Path) -> dict[str, dict[str, Any]]:
    """Step name -> record, of the steps whose output is the one published in the run folder (older variants stay out)."""
    current: dict[str, dict[str, Any]] = {}
    for path in sorted(run.glob("steps/*/record.json")):
        record = read_json(path)
        word, _, rest = record["step"].partition("-")
        places = {
            "data": ("check.json", "check.json"),
            "plan": ("plan.json", "plan.json"),
            "train": ("train.json", f"train-{rest}.json"),
            "evaluate": ("measures.json", f"measures/{rest}.json"),
            "floor": ("items/desk.jsonl", "items/floor/desk.jsonl"),
            "verdict": ("verdict.json", "verdict.json"),
        }
        output, published = places.get(word, ("", ""))
        if output and (run / published).is_file() and record.get("outputs", {}).get(output) == hash_file(run / published):
            current[record["step"]] = {**record, "folder": str(path.parent)}
    return current


def _gate(raw: dict[str, Any], trivial: str | None, run: Path) -> Gate:
    told = {**raw, "title": "", "reading": ""}
    gate = _read(Gate, told, run / "verdict.json")
    title = wording.gate_title(gate.kind, gate.task, gate.score, gate.over, gate.margin, trivial)
    return gate.model_copy(update={"title": title, "reading": wording.gate_reading(gate.model_dump())})


def _arms(run: Path, study: Study, shipped: Shipped | None, gaps: list[Gap]) -> list[ArmResult]:
    arms = []
    for arm in study.evaluate.arms:
        for seed in study.train.seeds if arm == "qlora" else [None]:
            name = arm if seed is None else f"{arm}-{seed}"
            path = run / "measures" / f"{name}.json"
            raw = _optional(
                path,
                gaps,
                wording.arm_name(arm) + (f", seed {seed}" if seed is not None else ""),
                f"The arm `{name}` has no measures in the run folder.",
            )
            if raw is not None:
                ships = shipped is not None and shipped.arm == arm and shipped.seed == seed
                arms.append(_read(ArmResult, {**raw, "name": name, "shipped": ships}, path))
    return arms


def _training(run: Path, study: Study, shipped: Shipped | None, gaps: list[Gap]) -> list[TrainingRun]:
    runs = []
    for seed in study.train.seeds:
        path = run / f"train-{seed}.json"
        raw = _optional(path, gaps, f"Training with seed {seed}", f"train-{seed}.json is not in the run folder.")
        if raw is not None:
            runs.append(_read(TrainingRun, {**raw, "shipped": shipped is not None and shipped.seed == seed}, path))
    return runs


def _model(run: Path, study: Study, records: dict[str, dict[str, Any]]) -> tuple[BaseModelFacts, str | None]:
    """What is known of the base, and the hash of its files: as the run wrote it down, else from this version's catalog."""
    told: dict[str, Any] = {}
    for record in records.values():
        key = record.get("needs", {}).get("base", {}).get("key", "")
        path = run / "steps" / f"base-{key[:12]}" / "base.json"
        if key and path.is_file():
            told = read_json(path)
            break
    catalog = {} if "parameters" in told else _from_catalog(study.model.name)
    known = {**catalog, **{k: v for k, v in told.items() if v is not None}}
    hub = known.get("hub") or {}
    facts = BaseModelFacts(
        name=known.get("name") or study.model.name,
        licence=known.get("licence"),
        parameters=known.get("parameters"),
        note=known.get("note") or "",
        hub_name=hub.get("repository"),
    )
    return facts, known.get("sha256")


def _from_catalog(name: str) -> dict[str, Any]:
    from fourscore.model import describe

    try:
        return describe(name).to_json()
    except FourscoreError:
        return {}


def _cost(arms: list[ArmResult], records: dict[str, dict[str, Any]], training: list[TrainingRun]) -> StudyCost | None:
    """The whole study at the rates of the shipped arm: energy, carbon and money all grow with the seconds the machine works."""
    arm = next((a for a in arms if a.shipped), None) or next((a for a in arms if a.energy is not None), None)
    total = _seconds_of(records, "") or (sum(a.seconds or 0.0 for a in arms) + sum(t.seconds or 0.0 for t in training))
    if not total:
        return None
    energy = arm.energy if arm is not None else None
    if energy is None or not energy.answer_seconds:
        return StudyCost(seconds=total, kwh=None, kg_co2=None, money=None, currency="", method="no power figure in this run")
    factor = total / (1000.0 * energy.answer_seconds)

    def scaled(estimate: Estimate | None) -> Estimate | None:
        return estimate and Estimate(value=estimate.value * factor, low=estimate.low * factor, high=estimate.high * factor)

    each = energy.per_1000_answers
    return StudyCost(
        seconds=total,
        kwh=scaled(each.kwh),
        kg_co2=scaled(each.kg_co2),
        money=scaled(each.money),
        currency=energy.currency,
        method=f"{energy.method}; the rate of answering, applied to the whole time of the study",
    )


def _seconds_of(records: dict[str, dict[str, Any]], word: str) -> float | None:
    times = [r["seconds"] for name, r in records.items() if name.startswith(word) and r.get("seconds") is not None]
    return sum(times) if times else None


def _name_resumed(gaps: list[Gap], records: dict[str, dict[str, Any]]) -> None:
    resumed = sorted(name for name, record in records.items() if record.get("resumed"))
    if resumed:
        why = f"These were stopped and resumed, and only the last part was timed: {', '.join(resumed)}."
        gaps.append(Gap(what="The whole time of some steps", why=why))


def _predictions(
    plan: Any, arms: list[ArmResult], training: list[TrainingRun], records: dict[str, dict[str, Any]], cost: StudyCost | None
) -> list[Prediction]:
    if not plan:
        return []
    said: dict[str, Any] = plan.get("predicted", {})
    trained = [t.seconds for t in training if t.seconds is not None]
    evaluated = [a.seconds for a in arms if a.seconds is not None]
    measured_peaks = [a.peak_rss_bytes for a in arms if a.peak_rss_bytes is not None]
    peaks = [t.peak_rss_bytes for t in training if t.peak_rss_bytes is not None]
    gpu_trained = [t.peak_gpu_bytes for t in training if t.peak_gpu_bytes is not None]
    gpu_measured = [a.peak_gpu_bytes for a in arms if a.peak_gpu_bytes is not None]
    evaluating = _seconds_of(records, "evaluate-") or (sum(evaluated) if evaluated else None)
    kwh, money = (cost.kwh, cost.money) if cost else (None, None)
    rows: list[tuple[str, Literal["s", "bytes", "kWh", "money"], str, float | None, str]] = [
        ("Training", "s", "train_seconds", _seconds_of(records, "train-") or (sum(trained) if trained else None), "all seeds"),
        ("Evaluating", "s", "evaluate_seconds", evaluating, "all arms"),
        ("Whole study", "s", "total_seconds", cost.seconds if cost else None, "all steps but fetching"),
        ("Memory while training", "bytes", "train_peak_rss_bytes", max(peaks) if peaks else None, "peak, one seed"),
        ("Memory while measuring", "bytes", "evaluate_peak_rss_bytes", max(measured_peaks) if measured_peaks else None, "peak of any arm"),
        ("Memory of the GPU while training", "bytes", "train_peak_gpu_bytes", max(gpu_trained, default=None), "peak, one seed"),
        ("Memory of the GPU while measuring", "bytes", "evaluate_peak_gpu_bytes", max(gpu_measured, default=None), "peak of any arm"),
        ("Electricity", "kWh", "energy_kwh", kwh.value if kwh else None, "by the measured time"),
        ("Money", "money", "money", money.value if money else None, "by the measured time"),
    ]
    predictions = []
    for what, unit, key, fact, how in rows:
        guess = said.get(key)
        if guess is not None or fact is not None:
            error = fact / guess - 1 if guess and fact is not None else None
            predictions.append(Prediction(what=what, unit=unit, predicted=guess, measured=fact, error=error, how=how))
    return predictions


def _answers(
    run: Path, shipped: Shipped | None, records: dict[str, dict[str, Any]], choices: list[str], gaps: list[Gap]
) -> tuple[Answers | None, list[AnswerShare]]:
    if shipped is None:
        gaps.append(Gap(what="Answers side by side", why="No adapter was chosen to ship."))
        return None, []
    after_name = shipped.arm if shipped.seed is None else f"{shipped.arm}-{shipped.seed}"
    paths = [run / "items" / name / "desk.jsonl" for name in ("base-16bit", after_name)]
    if not all(path.is_file() for path in paths):
        gaps.append(Gap(what="Answers side by side", why="The item logs of the original or of the tuned model are not in the run folder."))
        return None, []
    before, after = (read_jsonl(path) for path in paths)
    questions = _questions(records)
    if not questions:
        gaps.append(Gap(what="The questions' wording", why="The held-out rows are not in the run folder; answers are shown by their id."))
    return compare_answers(before, after, questions), share_by_answer(before, after) if choices else []


def _questions(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """id -> what the user said, from the held-out rows that the data step wrote."""
    if "data" not in records:
        return {}
    path = Path(records["data"]["folder"]) / "evaluation.jsonl"
    return {row["id"]: _user_text(row["messages"]) for row in read_jsonl(path)} if path.is_file() else {}


def _user_text(messages: list[dict[str, Any]]) -> str:
    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    return "\n".join(part.get("text", f"[{part.get('type')}]") for part in parts)


def _name_gaps(gaps: list[Gap], arms: list[ArmResult], told: dict[str, Any], model: BaseModelFacts, check: Any) -> None:
    if arms and all(a.energy is None for a in arms):
        gaps.append(Gap(what="Electricity, carbon and money", why="No arm has an energy figure."))
    elif arms and all(a.energy is None or a.energy.per_1000_answers.kg_co2 is None for a in arms):
        gaps.append(Gap(what="Carbon", why="The grid's carbon intensity could not be looked up."))
    if arms and all(a.fidelity is None for a in arms):
        gaps.append(Gap(what="Distance from the original model", why="No arm has its word-by-word probabilities compared (KL, flips)."))
    if not told.get("floor"):
        gaps.append(Gap(what="The measuring noise (A/A floor)", why="No arm was measured twice through the two engine paths."))
    if not told.get("recipe") or all(r.get("low") is None for r in told["recipe"]):
        why = "Under five seeds no honest interval exists: one adapter was judged, not the recipe."
        gaps.append(Gap(what="What the recipe would do again", why=why))
    if model.licence is None:
        gaps.append(Gap(what="The model's licence", why="Nobody named it in this run. Find it before you pass the model on."))
    if check and not check.get("licence"):
        gaps.append(Gap(what="The data's licence", why="The study file names none; until you know it, you cannot know what you may do."))


def _reproduce(
    run: Path, study: Study, plan: Any, check: Any, shipped: Shipped | None, records: dict[str, dict[str, Any]], base_sha256: str | None
) -> Reproduce:
    hashes = {"study": study.digest()}
    if check and check.get("sha256"):
        hashes["data"] = check["sha256"]
    if base_sha256:
        hashes["base model"] = base_sha256
    if shipped and shipped.adapter_sha256:
        hashes["adapter"] = shipped.adapter_sha256
    if shipped and shipped.base_sha256:
        hashes[OWN_BASE] = shipped.base_sha256
    hashes["verdict.json"] = hash_file(run / "verdict.json")
    environment: dict[str, Any] = next((r["environment"] for r in records.values() if r.get("environment")), {})
    versions = {k: str(v) for k, v in environment.get("versions", {}).items()}
    machine = dict((plan or {}).get("machine") or {})
    for key in ("device", "kernels", "dtype", "threads"):
        if key in environment and (key not in machine or key == "kernels"):  # the machine's own are the processor's
            machine[key] = environment[key]
    return Reproduce(
        commands=[f"fourscore run runs/{study.study}/study.yaml", f"fourscore verify runs/{study.study}"],
        hashes=hashes,
        versions=versions,
        machine=machine,
    )
