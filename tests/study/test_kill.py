"""A study that is killed again and again ends where an unkilled one ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourscore.files import hash_folder, read_json

KILLS = 20

# Loaded by Python's start-up in every process of the killed study: the n-th rename of a process dies just before it
# happens, which is the moment when a complete file still bears its temporary name.
FAULT = """
import os, signal
if os.environ.get("DIE_BEFORE_RENAME"):
    left = [int(os.environ["DIE_BEFORE_RENAME"])]
    real = os.replace
    def replace(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    os.replace = replace
"""


def write_study(folder: Path, model: Path) -> Path:
    """A little sorting desk for the tiny model: 60 customers, one word decides the answer."""
    words = {"refund": "billing", "login": "access", "parcel": "delivery"}
    rng = random.Random(5)
    with open(folder / "rows.jsonl", "w") as file:
        for customer in range(60):
            for _ in range(2):
                word = rng.choice(list(words))
                number = rng.randrange(10**6)
                file.write(json.dumps({"customer": customer, "text": f"My {word} number {number} is wrong.", "desk": words[word]}) + "\n")
    study = folder / "study.yaml"
    study.write_text(
        f"""
study: small
model: {{name: {model}}}
data:
  source: rows.jsonl
  licence: LicenseRef-own
  prompt: {{system: Name the desk., user: "{{{{ text }}}}", answer: "{{{{ desk }}}}"}}
  choices: [billing, access, delivery]
  group: customer
  split: {{validation: 0.2, evaluation: 0.4}}
  max_tokens: 128
train: {{rank: 4, tokens_per_step: 256, epochs: 2, seeds: [1, 2], checkpoint_minutes: 0.001, dropout: 0.1}}
evaluate: {{max_new_tokens: 4, latency_prompts: 2, fidelity_items: 4}}
threads: 1
"""
    )
    return study


def command(study: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "fourscore.cli", "run", str(study), "--runs", str(runs), "--json"]


def test_twenty_kills_change_nothing(tmp_path: Path, tiny_llama: Path):
    study = write_study(tmp_path, tiny_llama)
    started = time.monotonic()
    quiet = subprocess.run(command(study, tmp_path / "quiet"), capture_output=True, text=True)
    whole = time.monotonic() - started
    assert quiet.returncode in (0, 3, 4), quiet.stderr

    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    rng = random.Random(20)
    killed = 0
    places = [tmp_path / "killed-1"]
    for attempt in range(20 * KILLS):
        renames = rng.randrange(1, 14) if attempt % 2 else 0
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "fault"), "DIE_BEFORE_RENAME": str(renames or "")}
        process = subprocess.Popen(command(study, places[-1]), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not renames:
            # The pauses are spread so that twenty kills reach from the first step to the last.
            try:
                process.wait(timeout=rng.uniform(0.3, 2.2 * whole / KILLS + 2.5))
            except subprocess.TimeoutExpired:
                process.kill()
        if process.wait() in (0, 3, 4):
            # Done before the last kill, on a fast machine: the other kills fall on the study begun once more elsewhere.
            places.append(tmp_path / f"killed-{len(places) + 1}")
            continue
        killed += 1
        nothing_looks_finished_that_is_not(places[-1] / "small")
        if killed == KILLS:
            break
    assert killed == KILLS
    for place in places:
        last = subprocess.run(command(study, place), capture_output=True, text=True)
        assert last.returncode == quiet.returncode, last.stderr
        same_results(tmp_path / "quiet" / "small", place / "small")
    for run in [tmp_path / "quiet", *places]:
        verified = subprocess.run([sys.executable, "-m", "fourscore.cli", "verify", str(run / "small")], capture_output=True, text=True)
        assert verified.returncode == 0, verified.stdout


def same_results(one: Path, other: Path) -> None:
    """The adapter, every answer of every arm and the verdict are the same bytes."""
    assert hash_folder(one / "adapter") == hash_folder(other / "adapter")
    assert hash_folder(one / "items") == hash_folder(other / "items")
    assert (one / "verdict.json").read_bytes() == (other / "verdict.json").read_bytes()


def nothing_looks_finished_that_is_not(run: Path) -> None:
    """A step's folder with its final name is complete: its record stands and every output has the recorded hash."""
    for folder in (run / "steps").glob("[!.]*"):
        outputs = read_json(folder / "record.json")["outputs"]
        found = hash_folder(folder)
        found.pop("record.json")
        assert found == outputs


def test_two_runs_of_one_study_do_not_mix(tmp_path: Path, tiny_llama: Path):
    study = write_study(tmp_path, tiny_llama)
    first = subprocess.Popen(command(study, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        lock = tmp_path / "small" / "lock"
        for _ in range(600):
            if lock.exists() and lock.read_text():
                break
            time.sleep(0.05)
        second = subprocess.run(command(study, tmp_path), capture_output=True, text=True)
        assert second.returncode == 1
        assert "in use" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, tiny_llama)
    done = subprocess.run(command(study, folder), capture_output=True, text=True)
    assert done.returncode in (0, 3, 4), done.stderr
    return folder


def test_a_second_run_does_nothing_and_says_the_same(finished: Path):
    before = hash_folder(finished / "small")
    again = subprocess.run(command(finished / "study.yaml", finished), capture_output=True, text=True)
    assert json.loads(again.stdout)["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE")
    assert hash_folder(finished / "small") == before


@pytest.mark.parametrize(
    "target",
    [
        "items/qlora-1/desk.jsonl",
        "verdict.json",
        "adapter/adapter_model.safetensors",
        "report.html",
        "evidence.jsonl",
        "steps/*/items/desk.jsonl",
        "steps/*/record.json",
        "../rows.jsonl",
    ],
)
def test_one_changed_byte_is_found(finished: Path, target: str):
    run = finished / "small"
    path = next(run.glob(target)) if "*" in target else run / target
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    path.write_bytes(broken)
    try:
        done = subprocess.run([sys.executable, "-m", "fourscore.cli", "verify", str(run), "--json"], capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        assert done.stdout.strip() or done.stderr.strip()
    finally:
        path.write_bytes(whole)
    assert subprocess.run([sys.executable, "-m", "fourscore.cli", "verify", str(run)], capture_output=True).returncode == 0


def test_ctrl_c_is_one_line_and_exit_130(tmp_path: Path, tiny_llama: Path):
    study = write_study(tmp_path, tiny_llama)
    words = [word for word in command(study, tmp_path) if word != "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("[3/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the program and all its children
    assert process.wait() == 130
    assert said.rstrip().endswith("fourscore: stopped. Run the same command to go on where it was.")
    assert "Traceback" not in said
