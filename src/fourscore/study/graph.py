"""The steps of a pilot study, in an order in which each finds what it needs.

base -> data -> plan   (and base -> residual, where `train.init` takes its part out of the base)
          |-> train-<seed> ...      one adapter a seed
          |-> evaluate-<arm> ...    each arm in its own process; base-16bit first, the others are compared with it
          '-> floor -> verdict -> report
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, read_json, write_json
from fourscore.spec import NEW_BASE, Study
from fourscore.study.inputs import Inputs
from fourscore.study.plan import FLOOR_ITEMS
from fourscore.study.steps import Context, Step

RESIDUAL = "residual"  # the step that makes the adapters' own base, where `train.init` wants one


def graph_of(study: Study, inputs: Inputs) -> list[Step]:
    """All steps of a study, in order. The inputs enter by their contents; where they stand is not part of any key."""
    whole = study.model_dump(mode="json")
    whole["model"] |= {"name": inputs.base_sha256, "source": None, "revision": None}
    whole["data"] |= {"source": Path(study.data.source).name, "sha256": inputs.source_sha256}
    model, data, train = whole["model"], whole["data"], whole["train"]
    recipe = {"train": {k: v for k, v in train.items() if k != "seeds"}, "model": model}
    asked = {k: v for k, v in whole["evaluate"].items() if k not in ("arms", "gain", "confidence")}
    measured = {"evaluate": asked, "choices": data["choices"], "cost": whole["cost"]}
    quantised = {**measured, "model": model}

    def evaluation(arm: str, more: tuple[str, ...], settings: dict[str, Any], work: Callable[[Context], None], title: str) -> Step:
        return Step(f"evaluate-{arm}", ("base", "data", *more), settings, work, ("items/*", "top.npz"), title)

    steps = [
        Step("base", (), {"model": inputs.base_sha256}, describe_base, title=f"base model {study.model.name}"),
        Step("data", ("base",), {"data": data}, prepare_data, title="data: read, split, check"),
        Step("plan", ("base", "data"), {"study": whole}, make_plan, pure=(), title="plan: does it fit, how long"),
    ]
    residual: tuple[str, ...] = ()
    if study.train.init in NEW_BASE:
        residual = (RESIDUAL,)
        split = {"model": inputs.base_sha256, "train": {k: train[k] for k in ("init", "method", "rank", "alpha", "targets")}}
        title = f"split the base for {study.train.init}"
        steps.append(Step(RESIDUAL, ("base",), split, split_off, ("base/*", "adapter/*"), title))
    for seed in study.train.seeds:
        settings = {**recipe, "seed": seed}
        needs = ("base", "data", *residual)
        steps.append(Step(f"train-{seed}", needs, settings, train_adapter, ("adapter/*", "result.json"), f"train, seed {seed}"))
    steps.append(evaluation("base-16bit", (), measured, evaluate_base, "measure base-16bit, the reference"))
    for arm in study.evaluate.arms:
        if arm not in ("base-16bit", "qlora"):
            settings = measured if arm == "trivial" else quantised
            steps.append(evaluation(arm, ("evaluate-base-16bit",), settings, evaluate_base, f"measure {arm}"))
    adapters = tuple(f"train-{seed}" for seed in study.train.seeds)
    for seed in study.train.seeds:
        needs = ("evaluate-base-16bit", *residual, f"train-{seed}")
        steps.append(evaluation(f"qlora-{seed}", needs, quantised, evaluate_adapter, f"measure qlora, seed {seed}"))
    needs = ("base", "data", *residual, *adapters)
    steps.append(Step("floor", needs, {**quantised, "items": FLOOR_ITEMS}, measure_floor, ("items/*",), "A/A floor"))
    measures = tuple(s.name for s in steps if s.name.startswith("evaluate-"))
    decided = {"evaluate": whole["evaluate"], "seeds": train["seeds"]}
    steps.append(Step("verdict", (*adapters, *measures, "floor"), decided, decide, title="verdict"))
    everything = tuple(s.name for s in steps)
    steps.append(Step("report", everything, {"study": whole}, write_report, title="report", measured=True))
    return steps


def describe_base(context: Context) -> None:
    """Write down what the base model is."""
    from fourscore.model import base_sha256, describe

    write_json(context.out / "base.json", describe(context.base).to_json() | {"sha256": base_sha256(context.base)})


def prepare_data(context: Context) -> None:
    """Read, map, split and check the rows."""
    from fourscore.data import prepare
    from fourscore.model import load_tokenizer

    prepare(context.study.data, load_tokenizer(context.base), context.out)


def make_plan(context: Context) -> None:
    """Predict time and memory from a probe."""
    from fourscore.study.plan import plan

    write_json(context.out / "plan.json", plan(context.study, context.base, context.folders["data"]))


def split_off(context: Context) -> None:
    """The base without the part with which every seed's adapter starts, and that adapter."""
    from fourscore.model import split_base

    split_base(context.base, context.study.train, context.out)


def base_of_adapters(context: Context) -> Path:
    """The base that the study's adapters are trained on: the study's own, or what `split_off` left of it."""
    return context.folders[RESIDUAL] / "base" if RESIDUAL in context.folders else context.base


def train_adapter(context: Context) -> None:
    """Train one adapter on the 4-bit base."""
    from fourscore.data import read_rows
    from fourscore.model import add_lora, base_sha256, load
    from fourscore.train import train

    study, seed = context.study, int(context.step.removeprefix("train-"))
    data = context.folders["data"]
    rows = read_rows(data, "train")
    start = context.folders[RESIDUAL] / "adapter" if RESIDUAL in context.folders else None
    base, form = base_of_adapters(context), study.model
    model = load(base, "nf4", start, block_size=form.block_size, double_quant=form.double_quant, trainable=True)
    tuned = model if start else add_lora(model, study.train, seed, rows)
    result = train(tuned, rows, read_rows(data, "validation"), study.train, seed, context.out)
    own = {"base_sha256": base_sha256(base)} if RESIDUAL in context.folders else {}
    write_json(context.out / "result.json", {k: result.summary[k] for k in ("validation_loss", "adapter_sha256")} | own)


def evaluate_base(context: Context) -> None:
    """Measure an arm without an adapter."""
    _evaluate(context, context.step.removeprefix("evaluate-"), None, context.base, None)


def evaluate_adapter(context: Context) -> None:
    """Measure one seed's adapter."""
    seed = int(context.step.removeprefix("evaluate-qlora-"))
    _evaluate(context, "qlora", seed, base_of_adapters(context), context.folders[f"train-{seed}"] / "adapter")


def _evaluate(context: Context, arm: str, seed: int | None, base: Path, adapter: Path | None) -> None:
    from fourscore.evaluate import evaluate_arm

    evaluate_arm(
        arm,
        seed,
        context.study,
        base,
        context.folders["data"],
        context.out,
        adapter=adapter,
        reference=context.folders.get("evaluate-base-16bit"),
    )


def measure_floor(context: Context) -> None:
    """The adapter that ships, once more, through the engine's other path: what differs is the instrument's own noise."""
    from fourscore.evaluate import evaluate_arm

    seed = shipped_seed(context)
    evaluate_arm(
        "qlora",
        seed,
        context.study,
        base_of_adapters(context),
        context.folders["data"],
        context.out,
        adapter=context.folders[f"train-{seed}"] / "adapter",
        path="plain",
        limit=FLOOR_ITEMS,
    )


def losses_of(context: Context) -> dict[int, dict[str, Any]]:
    """Seed -> its validation loss, the hash of its adapter, and of the adapters' own base where there is one."""
    return {seed: read_json(context.folders[f"train-{seed}"] / "result.json") for seed in context.study.train.seeds}


def shipped_seed(context: Context) -> int:
    """The seed with the lowest validation loss; never chosen by evaluation items."""
    losses = losses_of(context)
    return min(losses, key=lambda seed: (losses[seed]["validation_loss"], seed))


def decide(context: Context) -> None:
    """Derive verdict.json from the items, and put the adapter that ships beside it."""
    import shutil

    from fourscore.study.verdict import derive, read_arms

    seed = shipped_seed(context)
    verdict = derive(context.study, read_arms(context.study, context.folders), losses_of(context), seed)
    write_json(context.out / "verdict.json", verdict)
    shutil.copytree(context.folders[f"train-{seed}"] / "adapter", context.out / "adapter", dirs_exist_ok=True)


def write_report(context: Context) -> None:
    """The page, the card and the machine-readable report, from the published files."""
    from fourscore import report

    if not (context.run / "verdict.json").is_file():
        raise FourscoreError("the report needs verdict.json", where=str(context.run), todo="run `fourscore run` on the study")
    report.write(context.run, context.out)
