"""NF4Linear as a module: casts, copies, state dicts, PEFT; and the replacement of a network's layers."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.nf4.layout import PARTS


def dense(out: int = 64, features: int = 128, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(features, out, bias=bias)


def small_llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        return LlamaForCausalLM(config).to(dtype)


def same(a: nf4.NF4Linear, b: nf4.NF4Linear) -> bool:
    x = torch.randn((3, a.in_features), generator=torch.Generator().manual_seed(0))
    return torch.equal(a.weight, b.weight) and torch.equal(a(x), b(x))


def test_a_layer_is_its_dense_one_quantised() -> None:
    lin = dense()
    layer = nf4.NF4Linear.from_linear(lin)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.requires_grad) == (128, 64, torch.uint8, False)
    x = torch.randn((5, 128))
    want = nn.functional.linear(x, nf4.dequantize(nf4.quantize(lin.weight), torch.float32), lin.bias)
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.dequantize(), nf4.dequantize(nf4.quantize(lin.weight)))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_casting_a_module_leaves_the_weight_alone(cast: str) -> None:
    layer = nf4.NF4Linear.from_linear(dense())
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    network = nn.Sequential(layer)
    getattr(network, cast)()
    network.to(torch.bfloat16).to("cpu").to(device="cpu", dtype=torch.float32)
    after = layer.state_dict()
    assert layer.bias.dtype == torch.float32
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_copies_pickles_and_state_dicts_keep_every_bit() -> None:
    layer = nf4.NF4Linear.from_linear(dense())
    twin = copy.deepcopy(layer)
    assert same(twin, layer)
    assert twin.weight.data_ptr() == twin.quantised.packed.data_ptr() != layer.weight.data_ptr()

    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer), buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=False)[0], layer)

    state = layer.state_dict()
    assert set(state) == {"bias", *(f"weight{'.' + p if p else ''}" for p in PARTS)}
    for assign in (False, True):
        empty = nf4.NF4Linear(128, 64)
        assert empty.load_state_dict(state, assign=assign) == ([], [])
        assert same(empty, layer)
    with pytest.raises(FourscoreError, match="no weight yet"):
        nf4.NF4Linear(128, 64)(torch.ones(128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight.absmax"), "weight.absmax is missing"),
        (lambda s: s.update(weight=s["weight"][:-1]), "do not make a weight of"),
        (lambda s: s["weight.quant_map"].mul_(2), "not NF4's"),
        (lambda s: s.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}), "cannot be read"),
        (lambda s: s.pop("weight.nested_quant_map"), "double quantisation is incomplete"),
        (lambda s: [s.pop(k) for k in list(s) if "." in k], "not a complete NF4 weight"),
    ],
)
def test_a_damaged_state_dict_is_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    state = OrderedDict((k, v.clone()) for k, v in nf4.NF4Linear.from_linear(dense()).state_dict().items())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        nf4.NF4Linear(128, 64).load_state_dict(state)


def test_autocast_and_compute_dtype() -> None:
    layer = nf4.NF4Linear.from_linear(dense())
    x = torch.randn((3, 128))
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    assert torch.equal(cast, layer(x.bfloat16()))
    fixed = nf4.NF4Linear.from_linear(dense(), compute_dtype=torch.bfloat16)
    assert torch.equal(fixed(x), layer(x.bfloat16()).float())


def test_every_decoder_layer_is_replaced_and_nothing_else() -> None:
    network = small_llama()
    names = nf4.replace_linears(network)
    assert len(names) == 14
    assert {n for n, m in network.named_modules() if isinstance(m, nf4.NF4Linear)} == set(names)
    assert type(network.lm_head) is nn.Linear
    assert type(network.model.embed_tokens) is nn.Embedding


def test_targets_choose_layers_and_must_exist() -> None:
    assert nf4.replace_linears(small_llama(), targets=["q_proj", "1.mlp.up_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(FourscoreError, match=r"no linear layer is named 'c_attn'.*down_proj, gate_proj, .*model.layers.0.self_attn.q_proj"):
        nf4.replace_linears(small_llama(), targets=["q_proj", "c_attn"])
    with pytest.raises(FourscoreError, match="no linear layer to quantise"):
        nf4.replace_linears(nn.Sequential(nn.ReLU()))


def test_a_bad_weight_and_experts_are_named() -> None:
    network = small_llama()
    network.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(FourscoreError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: the weight holds nan"):
        nf4.replace_linears(network)

    network = small_llama()
    network.model.layers[0].mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros((4, 8, 8)))])
    with pytest.raises(FourscoreError, match=r"model\.layers\.0\.mlp\.experts\.0: a 3-D weight"):
        nf4.replace_linears(network)


def test_empty_layers_on_meta_are_filled_by_a_state_dict() -> None:
    network = small_llama()
    nf4.replace_linears(network)
    with torch.device("meta"):
        empty = LlamaForCausalLM(network.config)
    nf4.replace_linears(empty)
    empty.load_state_dict(network.state_dict(), assign=True)
    a, b = network.model.layers[1].mlp.down_proj, empty.model.layers[1].mlp.down_proj
    assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_wraps_it_as_an_ordinary_linear_layer(dtype: torch.dtype) -> None:
    """Forward and gradients match PEFT on the dense network that holds the dequantised weights."""
    network = small_llama(dtype)
    reference = copy.deepcopy(network)
    for name in nf4.replace_linears(network):
        reference.get_submodule(name).weight.data = network.get_submodule(name).dequantize(dtype)
    settings = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    losses, gradients = [], []
    for model in (network, reference):
        torch.manual_seed(1)
        tuned = get_peft_model(model, settings)
        wrapped = [m for m in tuned.modules() if isinstance(m, LoraLinear)]
        assert len(wrapped) == 14
        assert {p.dtype for n, p in tuned.named_parameters() if "lora_" in n} == {torch.float32}
        ids = torch.arange(24).view(2, 12)
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in tuned.parameters() if p.requires_grad]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 5e-3)
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.05)
