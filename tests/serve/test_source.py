"""A run is served when its bytes are the evaluated ones, and refused when one of them is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fourscore.files import FourscoreError, hash_file, read_json
from fourscore.serve.source import find_source


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of the tiny model."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"q": f"Is {n} it?", "a": "no" if n % 3 else "yes it is"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.yaml").write_text(
        f"""
study: small
model: {{name: {tiny_llama}}}
data:
  source: rows.jsonl
  licence: LicenseRef-own
  prompt: {{user: "{{{{ q }}}}", answer: "{{{{ a }}}}"}}
  choices: [yes it is, "no"]
  max_tokens: 64
train: {{rank: 4, tokens_per_step: 256, seeds: [1]}}
evaluate: {{max_new_tokens: 4, latency_prompts: 2, fidelity_items: 2}}
threads: 1
"""
    )
    words = [sys.executable, "-m", "fourscore.cli", "run", str(folder / "study.yaml"), "--runs", str(folder), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode in (0, 3, 4), done.stderr
    return folder / "small"


def test_a_run_is_served_with_the_reports_hashes(run: Path, tiny_llama: Path):
    source = find_source(str(run), {})
    report = read_json(run / "report.json")
    base, tuned = source.models
    assert source.evaluated
    assert tuned.verified
    assert tuned.adapter_sha256 == report["reproduce"]["hashes"]["adapter"]
    assert base.base_sha256 == tuned.base_sha256 == report["reproduce"]["hashes"]["base model"]
    assert tuned.verdict == report["verdict"]["verdict"]


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "report.json", "evidence.jsonl"])
def test_one_changed_byte_is_refused(run: Path, name: str):
    path = run / name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1", b"2", 1))
    try:
        with pytest.raises(FourscoreError, match="--unverified"):
            find_source(str(run), {})
        told = find_source(str(run), {}, unverified=True)
        assert told.faults
        assert not any(served.verified for served in told.models)
    finally:
        path.write_bytes(whole)
    assert not find_source(str(run), {}).faults


def test_another_base_is_refused(run: Path, tiny_llama: Path):
    config = tiny_llama / "config.json"
    whole = config.read_bytes()
    config.write_bytes(whole + b"\n")
    try:
        with pytest.raises(FourscoreError, match="base model"):
            find_source(str(run), {})
    finally:
        config.write_bytes(whole)


def test_a_model_takes_adapters_made_for_it(run: Path, tiny_llama: Path, tmp_path: Path):
    source = find_source(str(tiny_llama), {"mine": run / "adapter"})
    assert [served.id for served in source.models] == [tiny_llama.name, "mine"]
    assert source.models[1].adapter_sha256 == hash_file(run / "adapter" / "adapter_model.safetensors")
    assert not source.evaluated
