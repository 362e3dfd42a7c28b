"""Merging: the merged directory is an ordinary model that says what the adapter on its base says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from fourscore.files import FourscoreError
from fourscore.model import Model, add_lora, describe, load, merge, save_adapter, split_base
from fourscore.model.merging import read_changes
from fourscore.nf4 import NF4Linear
from fourscore.spec import Train

IDS = torch.tensor([[1, 2683, 198, 504, 3575, 282, 4649, 314, 7042, 2]])


def saved(model: Model, folder: Path, size: float = 0.3) -> Path:
    """An adapter that changes a lot."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.network.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
        if "magnitude" in name:
            parameter.data = parameter.data * (0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return save_adapter(model, folder)


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network.eval().float()(input_ids=IDS).logits


@pytest.fixture
def half(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model in bf16, in three shards with an index, as big models come."""
    folder = tmp_path / "half"
    network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    network.save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.mark.parametrize("into", ["original", "dequantised"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "rslora"}, {"method": "dora"}, {"targets": ["q_proj", "model.layers.1.mlp.down_proj"]}],
    ids=["lora", "rslora", "dora", "targets"],
)
def test_in_f32_the_merged_network_is_the_adapter_s(half: Path, tmp_path: Path, into: Any, settings: dict[str, Any]) -> None:
    adapter = saved(add_lora(load(half, "nf4"), Train(rank=4, alpha=6, **settings), 1), tmp_path / "adapter")
    told = merge(half, adapter, tmp_path / "merged", into, dtype=torch.float32)
    wanted = logits(load(half, "nf4" if into == "dequantised" else "f32", adapter).network)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert told.largest < 1e-5 < 0.1 < told.effect
    other = logits(load(half, "f32" if into == "dequantised" else "nf4", adapter).network)
    assert (found - other).abs().max() > 1e-3  # the two ways are two models


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_in_bf16_it_is_rounded_once(half: Path, tmp_path: Path, into: Any) -> None:
    adapter = saved(add_lora(load(half, "nf4"), Train(rank=4, method="dora"), 1), tmp_path / "adapter")
    merge(half, adapter, tmp_path / "wide", into, dtype=torch.float32)
    told = merge(load(half, "nf4"), adapter, tmp_path / "merged", into)
    assert 0 < told.mean < told.largest
    assert 0 < told.error < 0.02 < told.effect
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    exact, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="auto").state_dict() for n in ("wide", "merged"))
    assert all(torch.equal(exact[name].to(torch.bfloat16), rounded[name]) for name in exact)
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == load(half).tokenizer.apply_chat_template(chat, tokenize=False)
    assert describe(tmp_path / "merged").name == "half-merged"


def test_it_is_what_peft_merges(half: Path, tmp_path: Path) -> None:
    """PEFT on dense f32 weights is right; ours must agree, ranks and alphas by pattern included."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 20},
        use_dora=True,
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path / "adapter")
    changes = read_changes(tmp_path / "adapter")
    assert {len(c.A) for c in changes.values()} == {2, 4}
    assert sorted({c.scale for c in changes.values()}) == [1.5, 3.0, 10.0]
    merge(half, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    wanted = network.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_biases_and_tied_embeddings_stay(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(vocab_size=49152, tie_word_embeddings=True, **sizes)).to(torch.bfloat16)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    network.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    adapter = saved(add_lora(load(tmp_path / "base", "nf4"), Train(rank=4, targets=["v_proj", "gate_proj"]), 1), tmp_path / "adapter")
    merge(tmp_path / "base", adapter, tmp_path / "merged", dtype=torch.float32)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "merged"))
    assert before.keys() == after.keys()
    assert "lm_head.weight" not in after
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {"model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.gate_proj.weight"}


def test_a_split_base_takes_its_adapter(half: Path, tmp_path: Path) -> None:
    base, adapter = split_base(half, Train(rank=4, init="pissa"), tmp_path)
    merge(base, adapter, tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(
        logits(load(tmp_path / "merged", "f32").network), logits(load(base, "f32", adapter).network), rtol=0, atol=1e-5
    )
    with pytest.raises(FourscoreError, match="made for another base"):
        merge(half, adapter, tmp_path / "wrong")


def test_a_base_that_is_nf4_in_its_file(half: Path, tmp_path: Path) -> None:
    from fourscore.nf4 import NF4Config

    model = load(half, "nf4", block_size=128)
    model.network.config.quantization_config = NF4Config(block_size=128)
    model.network.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(half).save_pretrained(tmp_path / "nf4")
    base = load(tmp_path / "nf4", "nf4")
    assert base.block_size == 128
    adapter = saved(add_lora(base, Train(rank=4), 1), tmp_path / "adapter")
    merge(tmp_path / "nf4", adapter, tmp_path / "merged", "dequantised", dtype=torch.float32)
    wanted = logits(load(tmp_path / "nf4", "nf4", adapter).network)
    torch.testing.assert_close(logits(load(tmp_path / "merged", "f32").network), wanted, rtol=0, atol=1e-5)
    assert not any(isinstance(m, NF4Linear) for m in load(tmp_path / "merged", "bf16").network.modules())
    with pytest.raises(FourscoreError, match="holds no 16-bit weights"):
        merge(tmp_path / "nf4", adapter, tmp_path / "wrong")


def test_a_merge_that_loses_the_adapter_is_refused(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways in which others' merges went wrong: a layer left out, and a scale taken twice."""
    from fourscore.model import merging

    adapter = saved(add_lora(load(half, "nf4"), Train(rank=4), 1), tmp_path / "adapter")
    right = merging.read_changes

    def forgetful(*args: Any) -> dict[str, Any]:
        return {name: change for name, change in right(*args).items() if "mlp" not in name}

    def twice(*args: Any) -> dict[str, Any]:
        return {name: merging.Change(c.A, c.B, 2 * c.scale, c.magnitude) for name, c in right(*args).items()}

    for wrong in (forgetful, twice):
        monkeypatch.setattr(merging, "read_changes", wrong)
        with pytest.raises(FourscoreError, match=r"the merged network's logits are off by .*: not written"):
            merge(half, adapter, tmp_path / "merged", rows=[IDS[0].tolist()])
        assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_one_line(half: Path, tmp_path: Path) -> None:
    adapter = saved(add_lora(load(half, "nf4"), Train(rank=4, targets=["q_proj"]), 1), tmp_path / "adapter")
    with pytest.raises(FourscoreError, match="no merging into `halfway`"):
        merge(half, adapter, tmp_path / "m", "halfway")  # type: ignore[arg-type]
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "fourscore.json").unlink()
    for change, error in [
        ({"peft_type": "IA3"}, "an adapter with `peft_type: IA3` cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "an adapter with `modules_to_save` cannot be merged"),
        ({"init_lora_weights": "pissa"}, "an adapter with `init_lora_weights: pissa` cannot be merged"),
        ({"use_dora": True}, "lora_magnitude_vector of layer model.layers.0.self_attn.q_proj is missing"),
    ]:
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(FourscoreError, match=error) as raised:
            merge(half, adapter, tmp_path / "m")
        assert "\n" not in str(raised.value)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    moved = {name.replace("model.layers.0.self_attn.q_proj", "lm_head"): t for name, t in weights.items()}
    save_file(moved, adapter / "adapter_model.safetensors")
    with pytest.raises(FourscoreError, match="the adapter changes layer lm_head, which has no weights of its own"):
        merge(half, adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()
