"""Quantising while transformers loads gives, bit for bit, what loading first and quantising afterwards gives."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.model import load

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from architectures import PACKED, PLAIN, build, random_ids

EXPERTS = ("MixtralForCausalLM", "JambaForCausalLM")
NO_LINEAR = ("GPT2LMHeadModel",)  # its layers are transformers' Conv1D
DENSE = [name for name in {**PACKED, **PLAIN} if name not in EXPERTS + NO_LINEAR]


def saved(name: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    build(name, dtype).network.save_pretrained(folder, **options)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def everything(network: nn.Module) -> dict[str, torch.Tensor]:
    """State dict and the buffers that no file holds."""
    return {**network.state_dict(), **{f"buffer {n}": b for n, b in network.named_buffers()}}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("form", ["bf16, sharded", "f32"])
def test_equal_to_loading_first_and_quantising_afterwards(name: str, form: str, smollm2: Path, tmp_path: Path) -> None:
    if form == "f32":
        saved(name, tmp_path, smollm2, torch.float32)
    else:
        saved(name, tmp_path, smollm2, max_shard_size="30KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path, "nf4").network
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    nf4.replace_linears(theirs)
    a, b = everything(ours), everything(theirs)
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    tied = [[x.data_ptr() == y.data_ptr() for x in n.parameters() for y in n.parameters()] for n in (ours, theirs)]
    assert tied[0] == tied[1]
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.config.dtype == theirs.config.dtype
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    if name == "MambaForCausalLM":  # its own code takes a layer's weight for a dense matrix, which no 4-bit layer has
        return
    ids = torch.tensor([random_ids(24)])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_an_error(name: str, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="mixture-of-experts.*cannot be quantised"):
        load(saved(name, tmp_path, smollm2), "nf4")


def test_nothing_to_quantise_is_an_error(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="no linear layer to quantise"):
        load(saved("GPT2LMHeadModel", tmp_path, smollm2), "nf4")


@pytest.fixture
def qwen(smollm2: Path, tmp_path: Path) -> Path:
    return saved("Qwen3ForCausalLM", tmp_path / "model", smollm2)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_nan_names_its_weight(qwen: Path) -> None:
    rewrite(qwen, lambda t: t[UP][3].fill_(float("nan")))
    with pytest.raises(FourscoreError, match=f"^{UP}: the weight holds nan at row 3, column 0"):
        load(qwen, "nf4")


def test_a_missing_weight_is_an_error(qwen: Path) -> None:
    rewrite(qwen, lambda t: t.pop(UP))
    with pytest.raises(FourscoreError, match=f"1 weights are missing from the file \\({UP}\\)"):
        load(qwen, "nf4")


@pytest.mark.parametrize("name", [UP, "model.layers.1.mlp.up_proj.weight".replace("mlp.up_proj", "input_layernorm")])
def test_a_weight_of_another_shape_is_an_error(name: str, qwen: Path) -> None:
    rewrite(qwen, lambda t: t.update({name: t[name][:16].clone()}))
    with pytest.raises(FourscoreError, match="does not fit a layer|transformers cannot load it"):
        load(qwen, "nf4")


def test_a_weight_without_a_place_is_said(qwen: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOURSCORE_QUIET", raising=False)
    rewrite(qwen, lambda t: t.update({"model.extra.weight": torch.ones(3)}))
    load(qwen, "nf4")
    assert "1 weights of the file have no place in the network and are left out (model.extra.weight" in capsys.readouterr().err


def test_a_loaded_network_saves_as_bitsandbytes_nf4_and_loads_again(qwen: Path, smollm2: Path, tmp_path: Path) -> None:
    first = load(qwen, "nf4", block_size=128)
    first.network.save_pretrained(tmp_path / "again")
    shutil.copy(smollm2 / "tokenizer.json", tmp_path / "again")
    second = load(tmp_path / "again")
    assert (second.block_size, second.double_quant, second.quantised) == (128, True, first.quantised)
    a, b = first.network.state_dict(), second.network.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_damage_in_a_quantised_folder_is_one_clear_line(qwen: Path, smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    load(qwen, "nf4").network.save_pretrained(folder)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    whole = (folder / "model.safetensors").read_bytes()
    record = f"{UP}.quant_state.bitsandbytes__nf4"
    rewrite(folder, lambda t: t.update({record: torch.tensor(list(json.dumps({"quant_type": "fp4"}).encode()), dtype=torch.uint8)}))
    with pytest.raises(FourscoreError, match="its quantisation record cannot be read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)])
    with pytest.raises(FourscoreError, match="weights are missing from the file"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(FourscoreError, match="truncated safetensors file"):
        load(folder)
