"""Adapters by name give PEFT's own numbers, and leave the network as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import random_ids
from peft import PeftModel, PromptTuningConfig, get_peft_model

from fourscore.engine import Engine
from fourscore.files import FourscoreError
from fourscore.model import Model, load

REQUESTS = [(random_ids(9), random_ids(4, seed=1)), (random_ids(9), random_ids(3, seed=2))]


@pytest.fixture
def base(tiny_llama: Path) -> Model:
    return load(str(tiny_llama), weights="f32")


def by_peft(tiny_llama: Path, folder: Path) -> list[float]:
    network = PeftModel.from_pretrained(load(str(tiny_llama), weights="f32").network, str(folder))
    with torch.no_grad():
        rows = [torch.log_softmax(network(torch.tensor([c + t])).logits[0, len(c) - 1 : -1], -1)[range(len(t)), t] for c, t in REQUESTS]
    return [float(row.sum()) for row in rows]


def test_each_name_is_its_adapter_and_none_is_the_base(base: Model, tiny_llama: Path, folders: dict[str, Path]) -> None:
    before = Engine(base).score(REQUESTS)
    ids = torch.tensor([random_ids(6)])
    logits = base.network(ids).logits
    engine = Engine(base, adapters=folders)
    for name, folder in folders.items():
        assert [s for s, _ in engine.score(REQUESTS, adapter=name)] == pytest.approx(by_peft(tiny_llama, folder), abs=1e-4)
    assert engine.score(REQUESTS) == before
    torch.testing.assert_close(base.network(ids).logits, logits, rtol=0, atol=0)  # the network by itself is the base again
    assert engine.generate([REQUESTS[0][0]], 5, adapter="desk") != engine.generate([REQUESTS[0][0]], 5)
    state = engine.prefill(REQUESTS[0][0], adapter="desk")
    assert [state.next_id, engine.step(state)] == engine.generate([REQUESTS[0][0]], 2, adapter="desk")[0].ids


def test_a_model_loaded_with_its_adapter_keeps_it(tiny_llama: Path, folders: dict[str, Path]) -> None:
    model = load(str(tiny_llama), weights="f32", adapter=folders["desk"])
    engine = Engine(model, adapters={"till": folders["till"]})
    desk, till = by_peft(tiny_llama, folders["desk"]), by_peft(tiny_llama, folders["till"])
    assert [s for s, _ in engine.score(REQUESTS)] == pytest.approx(desk, abs=1e-4)
    assert [s for s, _ in engine.score(REQUESTS, adapter="till")] == pytest.approx(till, abs=1e-4)
    assert [s for s, _ in engine.score(REQUESTS)] == pytest.approx(desk, abs=1e-4)


def test_what_trained_before_trains_after(tiny_llama: Path, folders: dict[str, Path]) -> None:
    model = load(str(tiny_llama), weights="f32", adapter=folders["desk"], trainable=True)
    asks = [p.requires_grad for p in model.network.parameters()]
    assert any(asks)
    Engine(model).score(REQUESTS)
    Engine(model).score(REQUESTS, adapter="default")
    assert [p.requires_grad for p in model.network.parameters()] == asks


def test_errors_name_the_adapter_and_the_remedy(base: Model, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="no adapter named `desk`"):
        Engine(base).score(REQUESTS, adapter="desk")
    with pytest.raises(FourscoreError, match=r"no adapter_config\.json"):
        Engine(base, adapters={"desk": tmp_path})
    with pytest.raises(FourscoreError, match="no adapter named `till`. Known: desk"):
        Engine(base, adapters={"desk": folders["desk"]}).score(REQUESTS, adapter="till")
    with pytest.raises(FourscoreError, match="carries the adapters of another engine"):
        Engine(base, adapters={"desk": folders["desk"]})


def test_an_adapter_of_another_shape_is_an_error(base: Model, folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["desk"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(FourscoreError, match="the adapter does not fit the model"):
        Engine(base, adapters={"desk": tmp_path})


def test_an_adapter_that_adds_tokens_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    network = get_peft_model(load(str(tiny_llama), weights="f32").network, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    network.save_pretrained(str(tmp_path))
    with pytest.raises(FourscoreError, match="adds tokens to the prompt"):
        Engine(load(str(tiny_llama), weights="f32"), adapters={"soft": tmp_path})
