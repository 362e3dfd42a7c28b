"""Training as a user meets it: it learns, it repeats, it survives being killed, and it says what is wrong with which row."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from fourscore import spec
from fourscore.data import Row
from fourscore.files import FourscoreError
from fourscore.model import add_lora, load
from fourscore.train import loss_on_rows, probe, train

SETTINGS = spec.Train(
    rank=4, alpha=8, dropout=0.1, learning_rate=1e-2, epochs=3, tokens_per_step=200, evaluations=3, checkpoint_minutes=1e-6
)


def make_rows(count: int, first: int = 1) -> list[Row]:
    colours = ["red", "green", "blue"]
    rows = []
    for number in range(first, first + count):
        text = f"Thing {number} is {colours[number % 3]}" + " indeed" * (number % 5)
        message = {"role": "user", "content": [{"type": "text", "text": text}]}
        rows.append(Row(f"{number:016x}", number, [str(number)], [message], colours[number % 3], colours))
    return rows


TRAIN, VALIDATION = make_rows(24), make_rows(6, first=100)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("FOURSCORE_QUIET", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(path, seed=1, settings=SETTINGS):
    return add_lora(load(path, "nf4"), settings, seed)


def go(path, out, seed=1, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return train(fresh(path, seed, settings), TRAIN, VALIDATION, settings, seed, out)


def steps_of(out):
    """What decides the weights, step by step, as the log has it."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """One run that nothing interrupted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    result = go(tiny_llama, out)
    torch.set_num_threads(before)
    return result, out


def test_it_learns_and_the_best_adapter_is_the_one_kept(whole, tiny_llama):
    result, out = whole
    record = json.loads((out / "train.json").read_text())
    assert record == result.summary
    judged = [loss for *_, loss in record["losses"] if loss is not None]
    assert record["validation_loss"] == min(judged) < record["validation_loss_start"] == judged[0]
    assert record["supervised_tokens"] < record["tokens"]
    assert record["threads"] == 1
    again = load(tiny_llama, "nf4", adapter=out / "adapter")
    assert loss_on_rows(again, VALIDATION) == pytest.approx(record["validation_loss"], rel=1e-6)
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "log.jsonl", "train.json"]


def test_same_seed_same_weights_other_seed_other_weights(whole, tiny_llama, tmp_path):
    again, other = go(tiny_llama, tmp_path / "again"), go(tiny_llama, tmp_path / "other", seed=2)
    assert again.summary["adapter_sha256"] == whole[0].summary["adapter_sha256"]
    assert other.summary["adapter_sha256"] != whole[0].summary["adapter_sha256"]


def test_evaluating_in_the_middle_changes_nothing(whole, tiny_llama, tmp_path):
    """bitsandbytes on a CPU loses gradients after an evaluation: here every loss and gradient norm is the same, bit for bit."""
    go(tiny_llama, tmp_path, evaluations=9, patience=99)
    assert steps_of(tmp_path) == steps_of(whole[1])


def test_a_killed_run_goes_on_to_the_same_weights(whole, tiny_llama, tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        from pathlib import Path
        from test_train import go
        torch.set_num_threads(1)
        go(Path({str(tiny_llama)!r}), Path({str(tmp_path)!r}))
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "FOURSCORE_QUIET": "1"})
    wanted = f"step-{random.randint(2, 8):08d}"
    while child.poll() is None and not (tmp_path / "checkpoint" / wanted).exists():
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (tmp_path / "train.json").exists()
    resumed = go(tiny_llama, tmp_path)
    assert resumed.summary["adapter_sha256"] == whole[0].summary["adapter_sha256"]
    assert steps_of(tmp_path) == steps_of(whole[1])
    assert not (tmp_path / "checkpoint").exists()


class Crash(BaseException):
    """The power goes off."""


@pytest.fixture
def interrupted(tiny_llama, tmp_path, monkeypatch):
    """A run that died between writing its fourth checkpoint and renaming it."""
    replace, count = os.replace, 0

    def failing(source, target):
        nonlocal count
        count += os.path.basename(target).startswith("step-")
        if count == 4:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Crash):
            go(tiny_llama, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoint").glob("step-*")] == ["step-00000003"]
    return tmp_path


def test_a_crash_between_write_and_rename_leaves_the_older_checkpoint(interrupted, whole, tiny_llama):
    assert go(tiny_llama, interrupted).summary["adapter_sha256"] == whole[0].summary["adapter_sha256"]


def test_a_checkpoint_of_another_run_is_refused(interrupted, tiny_llama):
    with pytest.raises(FourscoreError, match="belongs to another run: .*seed was 1, is 2"):
        go(tiny_llama, interrupted, seed=2)
    with pytest.raises(FourscoreError, match=r"settings.learning_rate was 0.01, is 0.001"):
        go(tiny_llama, interrupted, learning_rate=1e-3)
    with pytest.raises(FourscoreError, match="another run: rows differs"):
        train(fresh(tiny_llama), TRAIN[1:], VALIDATION, SETTINGS, 1, interrupted)
    torch.set_num_threads(2)
    with pytest.raises(FourscoreError, match="threads was 1, is 2"):
        go(tiny_llama, interrupted)


def test_a_damaged_checkpoint_is_one_clear_line(interrupted, tiny_llama):
    file = interrupted / "checkpoint" / "step-00000003" / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FourscoreError, match="the checkpoint is damaged.*Delete its folder"):
        go(tiny_llama, interrupted)


def test_no_progress_stops_early_and_keeps_the_untuned_model(tiny_llama, tmp_path):
    result = go(tiny_llama, tmp_path, learning_rate=1e-30, evaluations=9, patience=2)
    assert result.summary["stopped_early"]
    assert result.summary["best_step"] == 0
    assert result.summary["validation_loss"] == result.summary["validation_loss_start"]
    assert result.summary["steps"] < result.summary["steps_planned"]


def test_a_row_whose_loss_is_not_finite_is_named(tiny_llama, tmp_path):
    model = fresh(tiny_llama)
    causal_lm = model.network.get_base_model()
    causal_lm.lm_head.weight = torch.nn.Parameter(causal_lm.lm_head.weight.clone(), requires_grad=False)
    (odd,) = model.tokenizer(" zebra", add_special_tokens=False)["input_ids"][:1]
    causal_lm.get_input_embeddings().weight.data[odd] = float("nan")
    message = {"role": "user", "content": [{"type": "text", "text": "A zebra"}]}
    rows = [*TRAIN[:8], Row("f" * 16, 77, ["z"], [message], "red", [])]
    with pytest.raises(FourscoreError, match="the loss of row 77 is nan"):
        train(model, rows, VALIDATION, SETTINGS, 1, tmp_path)
    assert not (tmp_path / "train.json").exists()


def test_no_rows_is_an_error(tiny_llama, tmp_path):
    with pytest.raises(FourscoreError, match="no validation rows"):
        train(fresh(tiny_llama), TRAIN, [], SETTINGS, 1, tmp_path)


def test_probe_takes_the_longest_rows_and_leaves_the_adapter_alone(tiny_llama):
    model = fresh(tiny_llama)
    before = {n: p.clone() for n, p in model.network.named_parameters() if p.requires_grad}
    measured = probe(model, TRAIN, SETTINGS)
    longest = sorted((len(model.tokenizer(r.messages[0]["content"][0]["text"])["input_ids"]) for r in TRAIN), reverse=True)
    assert sum(longest[:2]) < measured.tokens <= SETTINGS.tokens_per_step
    assert measured.seconds > 0
    assert measured.peak_rss_bytes > 50e6
    assert all(torch.equal(before[n], p) for n, p in model.network.named_parameters() if p.requires_grad)


def test_a_small_loss_is_reported_beside_the_label_prior(whole):
    """Three equally frequent colours of two tokens: log(25/8) nats an answer, half of it a token."""
    from math import log

    assert whole[0].summary["label_prior_loss"] == pytest.approx(log(25 / 8) / 2)
