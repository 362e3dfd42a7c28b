"""A whole study on a GPU: the same files, bitsandbytes' kernels. Skipped, and said so, where there is none."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fourscore
from fourscore.files import read_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: this path has not been run here")

STUDY = """
study: small
model: {{name: {model}}}
data:
  source: rows.jsonl
  licence: LicenseRef-own
  prompt: {{system: Name the desk., user: "{{{{ text }}}}", answer: "{{{{ desk }}}}"}}
  choices: [billing, access]
  split: {{validation: 0.2, evaluation: 0.4}}
  max_tokens: 128
train: {{rank: 4, tokens_per_step: 256, epochs: 2, seeds: [1], dropout: 0.1}}
evaluate: {{max_new_tokens: 4, latency_prompts: 2, fidelity_items: 4}}
"""


def test_the_same_study_runs_on_a_gpu_and_its_adapter_loads_on_a_cpu(tmp_path: Path, tiny_llama: Path) -> None:
    rng = random.Random(5)
    with open(tmp_path / "rows.jsonl", "w") as file:
        for _ in range(80):
            word, desk = rng.choice([("refund", "billing"), ("login", "access")])
            file.write(json.dumps({"text": f"My {word} number {rng.randrange(10**6)} is wrong.", "desk": desk}) + "\n")
    (tmp_path / "study.yaml").write_text(STUDY.format(model=tiny_llama))
    words = [sys.executable, "-m", "fourscore.cli", "run", "study.yaml", "--json"]
    environment = os.environ | {"FOURSCORE_DEVICE": "cuda"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 3, 4), done.stderr
    run = tmp_path / "runs" / "small"
    report = read_json(run / "report.json")
    assert report["reproduce"]["machine"]["device"].startswith("cuda: ")
    assert report["reproduce"]["machine"]["kernels"].startswith("bitsandbytes ")
    assert read_json(run / "train-1.json")["peak_gpu_bytes"] > 0
    models = [fourscore.load(tiny_llama, adapter=run / "adapter", device=device) for device in ("cpu", "cuda")]
    ids = torch.tensor([models[0].tokenizer("My refund number 17 is wrong.").input_ids])
    with torch.inference_mode():
        cpu, gpu = (m.network(input_ids=ids.to(m.network.device)).logits.float().cpu() for m in models)
    torch.testing.assert_close(gpu, cpu, rtol=5e-2, atol=5e-2)
