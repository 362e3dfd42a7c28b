"""A whole small pilot on the real SmolLM2 and real data: what `make pilot` does, with a few dozen rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def fourscore(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fourscore.cli", *words], capture_output=True, text=True, cwd=cwd, env=os.environ)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The run folder of a pilot cut down to what two cores do in about two minutes."""
    folder = tmp_path_factory.mktemp("pilot")
    study = yaml.safe_load((ROOT / "examples" / "pilot.yaml").read_text())
    study["data"] |= {"train_rows": 48, "validation_rows": 16, "evaluation_items": 32}
    study["train"] |= {"seeds": [1], "evaluations": 2, "tokens_per_step": 512}
    study["evaluate"] |= {"keep": [{"task": "piqa", "items": 16, "margin": 0.05}], "latency_prompts": 3, "fidelity_items": 4}
    (folder / "pilot.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    done = fourscore("run", "pilot.yaml", "--json", cwd=folder)
    assert done.returncode in (0, 3, 4), done.stderr
    assert json.loads(done.stdout)["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE")
    return folder / "runs" / "pilot"


def test_it_leaves_what_was_promised(run: Path):
    for name in ("report.html", "report.json", "verdict.json", "model-card.md", "evidence.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).stat().st_size > 0


def test_all_arms_answered_the_same_items(run: Path):
    arms = {f.parent.name: [json.loads(line) for line in f.read_text().splitlines()] for f in (run / "items").glob("*/desk.jsonl")}
    assert set(arms) == {"trivial", "base-16bit", "base-nf4", "qlora-1", "floor"}
    keys = {arm: {(i["id"], i["prompt_hash"]) for i in items} for arm, items in arms.items()}
    assert len(keys["qlora-1"]) == 32
    assert keys["trivial"] == keys["base-16bit"] == keys["base-nf4"] == keys["qlora-1"]


def test_the_adapter_opens_in_plain_peft(run: Path, smollm2: Path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16), run / "adapter")
    moved = [p for name, p in network.named_parameters() if "lora_B" in name]
    assert len(moved) == 30 * 7
    assert all(p.abs().max() > 0 for p in moved)


def test_training_lowered_the_loss(run: Path):
    told = json.loads((run / "train-1.json").read_text())
    assert told["validation_loss"] < told["validation_loss_start"]


def test_gate_and_verify_agree_with_the_verdict(run: Path):
    verdict = json.loads((run / "verdict.json").read_text())["verdict"]
    gate = fourscore("gate", "pilot.yaml", "--json", cwd=run.parent.parent)
    assert gate.returncode == {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}[verdict]
    assert fourscore("verify", str(run), cwd=run.parent.parent).returncode == 0
