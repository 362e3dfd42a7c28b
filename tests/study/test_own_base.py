"""A study whose adapters have a base of their own: what is published is whole, and answers as it was measured."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fourscore
from fourscore.data import read_rows
from fourscore.data.template import end_of_turn
from fourscore.evaluate.arm import questions
from fourscore.files import FourscoreError, read_json, read_jsonl
from fourscore.model import base_sha256

STUDY = """
study: small
model: {{name: {model}, block_size: 32}}
data:
  source: rows.jsonl
  licence: LicenseRef-own
  prompt: {{system: Name the desk., user: "{{{{ text }}}}", answer: "{{{{ desk }}}}"}}
  choices: [billing, access]
  split: {{validation: 0.2, evaluation: 0.4}}
  max_tokens: 128
train: {{rank: 4, tokens_per_step: 256, epochs: 2, seeds: [1], init: pissa, learning_rate: 0.01}}
evaluate: {{arms: [base-16bit, qlora], gain: {{over: [base-16bit]}}, max_new_tokens: 4, latency_prompts: 2, fidelity_items: 4}}
threads: 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("own-base")
    rng = random.Random(5)
    with open(folder / "rows.jsonl", "w") as file:
        for _ in range(80):
            word, desk = rng.choice([("refund", "billing"), ("login", "access")])
            file.write(json.dumps({"text": f"My {word} number {rng.randrange(10**6)} is wrong.", "desk": desk}) + "\n")
    (folder / "study.yaml").write_text(STUDY.format(model=tiny_llama))
    words = [sys.executable, "-m", "fourscore.cli", "run", "study.yaml", "--json"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 3, 4), done.stderr
    return folder / "runs" / "small"


def verify(run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fourscore.cli", "verify", str(run)], capture_output=True, text=True)


def test_the_published_adapter_gives_the_answers_that_were_measured(run: Path, tiny_llama: Path) -> None:
    """By the name of the model that was tuned, and by the path of the base beside it: the log-likelihood of every answer, and the texts."""
    measured = {item["id"]: item for item in read_jsonl(run / "items" / "qlora-1" / "desk.jsonl")}
    rows = read_rows(next((run / "steps").glob("data-*")), "evaluation")
    for name in (tiny_llama, run / "base"):
        model = fourscore.load(name, adapter=run / "adapter")
        engine = fourscore.Engine(model)
        asked = questions("desk", rows, model.tokenizer)
        told = engine.score([(q.prompt, ids) for q in asked for ids in q.continuations])
        found = [[told.pop(0)[0] for _ in q.continuations] for q in asked]
        assert {q.row.id for q in asked} == measured.keys()
        for question, values in zip(asked, found, strict=True):
            assert values == pytest.approx(measured[question.row.id]["loglik"], abs=1e-3)
        written = engine.generate([q.prompt for q in asked], 4, stop_ids=[end_of_turn(model.tokenizer)])
        assert [g.text for g in written] == [measured[q.row.id]["generated"] for q in asked]
    before = {item["id"]: item["loglik"] for item in read_jsonl(run / "items" / "base-16bit" / "desk.jsonl")}
    assert any(abs(a - b) > 0.1 for i, item in measured.items() for a, b in zip(item["loglik"], before[i], strict=True))


def test_everything_names_the_base(run: Path, tiny_llama: Path) -> None:
    digest = base_sha256(run / "base")
    assert digest != base_sha256(tiny_llama)
    told = read_json(run / "adapter" / "fourscore.json")
    assert told["base_sha256"] == digest
    assert told["split_from"] == {"name": tiny_llama.name, "sha256": base_sha256(tiny_llama)}
    assert read_json(run / "verdict.json")["shipped"]["base_sha256"] == digest
    report = read_json(run / "report.json")
    assert report["reproduce"]["hashes"]["the adapter's own base"] == digest
    assert report["reproduce"]["hashes"]["base model"] == base_sha256(tiny_llama)
    card, page = (run / "model-card.md").read_text(), (run / "report.html").read_text()
    assert 'fourscore.load(\'base\', weights="nf4", adapter="adapter")' in card
    assert card.count(digest) == 3
    assert digest in page
    assert "<code>base/</code>" in page


def test_verify_covers_the_base(run: Path) -> None:
    assert verify(run).returncode == 0
    weights = run / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()  # the step's own file stands: what was published is looked at by itself
    try:
        missing = verify(run)
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        changed = verify(run)
    finally:
        weights.write_bytes(whole)
    assert missing.returncode == changed.returncode == 1
    assert "base/model.safetensors: missing" in missing.stdout + missing.stderr
    assert "base/model.safetensors: changed since it was published" in changed.stdout + changed.stderr
    assert verify(run).returncode == 0


def test_the_adapter_alone_asks_for_its_base(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    with pytest.raises(FourscoreError, match="works on a base of its own .* which is not beside it"):
        fourscore.load(tiny_llama, adapter=tmp_path / "adapter")
