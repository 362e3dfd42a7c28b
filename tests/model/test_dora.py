"""DoRA on NF4 computes what PEFT's DoRA computes on the same weights, dequantised, and its files are PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fourscore import Engine, nf4
from fourscore.model import add_lora, load, save_adapter
from fourscore.model.dora import TiledDora, tiled_dora, weight_tiles
from fourscore.nf4 import NF4Linear, replace_linears
from fourscore.spec import Train

IDS = torch.tensor([[1, 2683, 198, 504, 3575, 282, 4649, 314, 7042, 2]])


def densify(network: nn.Module) -> nn.Module:
    """A copy with every NF4 layer as a dense f32 one of the same values."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, NF4Linear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight.data, dense.bias = module.dequantize(torch.float32), module.bias
            parent, _, key = name.rpartition(".")
            setattr(network.get_submodule(parent), key, dense)
    return network


def pair(dropout: float = 0.0, **lora: Any) -> tuple[nn.Module, nn.Module]:
    """Ours on NF4 (odd sizes: rows do not begin where blocks do), PEFT's on the dense values; q, k and v have biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **sizes))
    replace_linears(network)
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "use_dora": True, "lora_dropout": dropout, **lora}
    peft = get_peft_model(densify(network), LoraConfig(**config))
    with tiled_dora():
        ours = get_peft_model(network, LoraConfig(**config))
    torch.manual_seed(1)
    theirs = dict(peft.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            if "magnitude" in name:  # as PEFT begins: the norms of the weights themselves, then moved
                torch.testing.assert_close(parameter.data, theirs[name].data, rtol=1e-5, atol=1e-6)
                parameter.data = parameter.data * (0.5 + torch.rand(parameter.shape))
            else:
                parameter.data = torch.randn(parameter.shape) * 0.2
            theirs[name].data = parameter.data.clone()
    return ours, peft


def step(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(0, 64, (3, 20))
    network.train()
    network.zero_grad()
    logits = network(input_ids=ids).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"dropout": 0.3}])
def test_output_and_gradients_are_peft_s_on_the_dense_values(settings: dict[str, Any]) -> None:
    ours, peft = pair(**settings)
    got, gradients = step(ours)
    wanted, expected = step(peft)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
    assert len(gradients) == 3 * 14
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-5 * gradient.abs().max().item(), msg=name)


def test_the_norm_by_hand() -> None:
    """W = [[3, 4], [0, 5]] and 2 * B A = [[0, 0], [12, 0]]: lengths 5 and 13."""
    layer, base = TiledDora(False), nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    A, B = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0], [3.0]])
    assert layer.weight_norm(base, A, B, 2.0).tolist() == [5.0, 13.0]


@pytest.mark.parametrize(("out", "inside", "block"), [(7, 96, 64), (130, 72, 64), (64, 33, 32), (33, 35, 128)])
def test_tiles_are_the_dequantised_weight(out: int, inside: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourscore.model import dora

    monkeypatch.setattr(dora, "TILE", 300)
    layer = NF4Linear.from_linear(nn.Linear(inside, out), block)
    assert torch.equal(torch.cat(list(weight_tiles(layer))), nf4.dequantize(layer.quantised, torch.float32))


def test_while_evaluating_the_norm_follows_the_weights() -> None:
    ours, peft = pair()
    for network in (ours, peft):
        network.eval()
    ids = torch.randint(0, 64, (2, 9))
    with torch.inference_mode():
        first = ours(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, first)
    with torch.no_grad():
        for network in (ours, peft):
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.5)
        wanted = peft(input_ids=ids).logits
        assert not torch.allclose(wanted, first, atol=1e-3)
        torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=1e-5, atol=2e-5)
    step(ours)  # what was kept under inference mode does not stand in the way of gradients


def tuned(base: Path, folder: Path, **settings: Any) -> Path:
    """A saved adapter that changes something."""
    model = add_lora(load(base, "nf4"), Train(rank=4, alpha=8, **settings), seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.network.named_parameters()):
        if "lora_B" in name or "magnitude" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return save_adapter(model, folder)


def test_peft_loads_the_files_and_the_engine_serves_them(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tuned(tiny_llama, tmp_path / "dora", method="dora")
    with torch.no_grad():
        dense = densify(torch.nn.Module.float(load(tiny_llama, "nf4").network))
        wanted = PeftModel.from_pretrained(dense, str(folder)).eval()(input_ids=IDS).logits
        model = load(tiny_llama, "nf4", folder)
        torch.testing.assert_close(torch.nn.Module.float(model.network)(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), str(folder)).eval()
        assert float(nn.functional.cosine_similarity(plain(input_ids=IDS).logits.flatten(), wanted.flatten(), dim=0)) > 0.98

    lora = tuned(tiny_llama, tmp_path / "lora")
    both = Engine(load(tiny_llama, "nf4"), adapters={"lora": lora, "dora": folder})
    request = [(IDS[0, :6].tolist(), IDS[0, 6:].tolist())]
    by_name = {name: both.score(request, adapter=name)[0][0] for name in ("lora", "dora", None)}
    assert len(set(by_name.values())) == 3
    for name, path in (("lora", lora), ("dora", folder), (None, None)):
        assert by_name[name] == pytest.approx(Engine(load(tiny_llama, "nf4", path)).score(request)[0][0], abs=1e-4)


def test_a_fresh_adapter_changes_nothing(tiny_llama: Path) -> None:
    base = load(tiny_llama, "nf4")
    with torch.no_grad():
        torch.nn.Module.float(base.network)  # transformers forbids it for quantised networks, ours stay exact
        before = base.network(input_ids=IDS).logits
        network = add_lora(base, Train(rank=4, method="dora"), 1).network.eval()
        torch.testing.assert_close(network(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
