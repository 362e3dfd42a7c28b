"""Where adapters start: LoftQ lowers the error of quantising, PiSSA and OLoRA move weights without changing the model, EVA reads rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fourscore.data import Row
from fourscore.data.template import text_message
from fourscore.files import FourscoreError, hash_folder
from fourscore.model import add_lora, base_sha256, load, save_adapter, split_base
from fourscore.model.dora import weight_tiles
from fourscore.model.initialise import lora_layers, low_rank, principal
from fourscore.model.rewrite import Weights
from fourscore.spec import Train, parse_study

IDS = torch.tensor([[1, 2683, 198, 504, 3575, 282, 4649, 314, 7042, 2]])
WORDS = [
    "refund",
    "login",
    "parcel",
    "invoice",
    "house",
    "tree",
    "sky",
    "large",
    "bring",
    "never",
    "always",
    "machine",
    "ticket",
    "support",
    "billing",
    "phone",
    "order",
    "late",
]


def rows(count: int = 40) -> list[Row]:
    """Different questions of different lengths."""
    return [
        Row(str(i), i, [str(i)], [text_message("user", " ".join(WORDS[(i * 7 + k * k) % 18] for k in range(4 + i % 9)))], WORDS[i % 5], [])
        for i in range(1, count + 1)
    ]


def parameters(network: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits.float()


@given(
    st.integers(280, 400),
    st.integers(280, 700),
    st.integers(1, 24),
    st.floats(0.0, 2.0),
    st.integers(0, 9),
)
@settings(max_examples=8, deadline=None)
def test_low_rank_is_within_a_hundredth_of_the_best(out: int, inside: int, rank: int, decay: float, seed: int) -> None:
    """Eckart-Young: no error is below the root of the squared singular values left out. Decay 0: noise, as quantising leaves."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, inside + 1).pow(-decay)
    matrix = torch.randn(out, inside, generator=generator) * scale
    U, S, V = low_rank(matrix, rank)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    error = (matrix - (U * S) @ V.T).norm()
    assert best * (1 - 1e-4) <= error <= best * 1.01


@pytest.mark.parametrize(("method", "alpha"), [("lora", 8), ("lora", 32), ("rslora", 8), ("dora", 16)])
def test_loftq_lowers_the_error_of_every_layer_and_leaves_the_base(tiny_llama: Path, method: Any, alpha: float) -> None:
    weights = Weights(tiny_llama)
    before = {n: p.clone() for n, p in load(tiny_llama, "nf4").network.named_parameters()}
    model = add_lora(load(tiny_llama, "nf4"), Train(rank=8, alpha=alpha, method=method, init="loftq"), 1)
    layers = lora_layers(model.network)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"])
        W, Q = weights.layer(name), torch.cat(list(weight_tiles(layer.get_base_layer())))
        change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = torch.linalg.svdvals(W - Q)[8:].norm()
        assert (W - Q - change).norm() <= 1.001 * best < 0.95 * (W - Q).norm()
    whole = load(tiny_llama, "f32")
    quantised = logits(load(tiny_llama, "nf4").network)
    assert (logits(model.network) - logits(whole.network)).norm() < (quantised - logits(whole.network)).norm()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_split_is_peft_s(kind: Any) -> None:
    """Against PEFT's own start on a dense f32 layer: the same product, the same base left."""
    torch.manual_seed(0)
    W = torch.randn(24, 40)
    net = nn.Sequential(nn.Linear(40, 24, bias=False))
    net[0].weight.data = W.clone()
    peft = get_peft_model(net, LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=kind)).base_model.model[0]
    A, B = principal(W, 4, 3.0, kind)
    torch.testing.assert_close(B @ A, peft.lora_B["default"].weight @ peft.lora_A["default"].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(W - 3.0 * B @ A, peft.base_layer.weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "method"), [("pissa", "lora"), ("olora", "rslora"), ("pissa", "dora")])
def test_a_split_base_and_its_adapter_are_the_model(tiny_llama: Path, tmp_path: Path, kind: Any, method: Any) -> None:
    settings = Train(rank=4, alpha=8, init=kind, method=method, targets=["q_proj", "down_proj"])
    base, adapter = split_base(tiny_llama, settings, tmp_path)
    whole = logits(load(tiny_llama, "f32").network)
    assert not torch.allclose(logits(load(base, "f32").network), whole, atol=0.05)
    both = logits(load(base, "f32", adapter).network)
    rounded = logits(load(tiny_llama, "bf16").network.float())  # the new base is in 16 bit
    assert (both - whole).norm() < 3 * (rounded - whole).norm()
    told = json.loads((adapter / "fourscore.json").read_text())
    assert told["base_sha256"] == base_sha256(base) != base_sha256(tiny_llama)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == f"{tiny_llama.name}-{kind}-r4"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    torch.testing.assert_close(logits(peft), both, rtol=1e-4, atol=1e-4)
    found = load(tiny_llama, "f32", adapter)  # asked for by the model's name, it is found beside the adapter
    assert found.path == base
    assert torch.equal(logits(found.network), both)
    model = load(base, "nf4", adapter, trainable=True)
    assert len(parameters(model.network)) == (6 if method == "dora" else 4) * 2
    assert all(p.dtype == torch.float32 for p in parameters(model.network).values())


def test_an_adapter_without_its_own_base_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    base, adapter = split_base(tiny_llama, Train(rank=4, init="olora", targets=["q_proj"]), tmp_path)
    kept = tmp_path / "elsewhere"
    shutil.move(base, kept)
    with pytest.raises(
        FourscoreError, match=r"base of its own \(.*-olora-r4, \w{12}\), which is not beside it.*[Pp]ut the run's `base` folder"
    ) as raised:
        load(tiny_llama, "nf4", adapter)
    assert "\n" not in str(raised.value)
    assert load(kept, "nf4", adapter).path == kept
    split_base(tiny_llama, Train(rank=2, init="olora", targets=["q_proj"]), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "base", base)
    with pytest.raises(FourscoreError, match="and the one beside it is another"):
        load(tiny_llama, "nf4", adapter)
    with pytest.raises(FourscoreError, match="made for another base"):
        load(base, "nf4", adapter)


def test_a_base_is_quantised_as_its_adapter_was_trained(tiny_llama: Path, tmp_path: Path) -> None:
    model = add_lora(load(tiny_llama, "nf4", block_size=128, double_quant=False), Train(rank=4, targets=["q_proj"]), 1)
    folder = save_adapter(model, tmp_path / "adapter")
    again = load(tiny_llama, "nf4", folder)
    assert (again.block_size, again.double_quant) == (128, False)
    assert torch.equal(logits(again.network), logits(model.network))
    assert load(tiny_llama, "nf4", folder, block_size=64, double_quant=True).block_size == 64


def test_eva_reads_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    """A's rows are orthonormal, as principal directions are; the model is unchanged; all ranks together are what was asked for."""
    before = logits(load(tiny_llama, "nf4").network)
    model = add_lora(load(tiny_llama, "nf4"), Train(rank=4, init="eva"), 1, rows())
    assert torch.equal(logits(model.network), before)
    layers = lora_layers(model.network)
    ranks = []
    for layer in layers.values():
        A = layer.lora_A["default"].weight.detach()
        ranks.append(len(A))
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-3)
        assert not layer.lora_B["default"].weight.any()
        assert layer.scaling["default"] == pytest.approx(32 / 4)
    assert sum(ranks) == 4 * 14
    folder = save_adapter(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert lora_layers(load(tiny_llama, "nf4", folder).network).keys() == layers.keys()


@pytest.mark.parametrize("init", ["loftq", "eva"])
def test_the_same_seed_gives_the_same_bits(tiny_llama: Path, init: Any) -> None:
    state = torch.random.get_rng_state()
    first, second = (
        parameters(add_lora(load(tiny_llama, "nf4"), Train(rank=4, init=init, method="dora"), 3, rows()).network) for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_split_has_the_same_bytes_again(tiny_llama: Path, tmp_path: Path, kind: Any) -> None:
    for name in ("one", "two"):
        split_base(tiny_llama, Train(rank=4, init=kind), tmp_path / name)
    assert hash_folder(tmp_path / "one") == hash_folder(tmp_path / "two")


def test_scales_by_hand(tiny_llama: Path) -> None:
    """alpha / rank, and alpha / sqrt(rank)."""
    for method, scale in (("lora", 32 / 16), ("rslora", 32 / 4)):
        model = add_lora(load(tiny_llama, "bf16"), Train(rank=16, alpha=32, method=method), 1)
        assert {layer.scaling["default"] for layer in lora_layers(model.network).values()} == {scale}


def test_what_does_not_go_together_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="`init: loftq` starts at what quantising lost, and layer .* is not quantised"):
        add_lora(load(tiny_llama, "bf16"), Train(init="loftq"), 1)
    with pytest.raises(FourscoreError, match="`init: pissa` begins with a base of its own.*split_base"):
        add_lora(load(tiny_llama, "nf4"), Train(init="pissa"), 1)
    with pytest.raises(FourscoreError, match="`init: lora` leaves the base as it is"):
        split_base(tiny_llama, Train(), tmp_path)
    with pytest.raises(FourscoreError, match="rank 48 is more than layer .*k_proj has \\(32 x 64\\).*Lower `train.rank`"):
        add_lora(load(tiny_llama, "nf4"), Train(rank=48, init="loftq"), 1)
    with pytest.raises(FourscoreError, match="rank 48 is more than layer .*k_proj has"):
        split_base(tiny_llama, Train(rank=48, init="olora"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FourscoreError, match="`init: eva` reads the training rows, and none are given"):
        add_lora(load(tiny_llama, "nf4"), Train(init="eva"), 1)
    with pytest.raises(FourscoreError, match="`init: eva` with rank 32 needs at least 64 tokens"):
        add_lora(load(tiny_llama, "nf4"), Train(rank=32, init="eva", targets=["q_proj"]), 1, short_row())
    network = load(tiny_llama, "nf4").network
    network.save_pretrained(tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    from fourscore.nf4 import NF4Config

    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config | {"quantization_config": NF4Config().to_dict()}))
    with pytest.raises(FourscoreError, match="the folder holds no 16-bit original"):
        add_lora(load(tmp_path / "nf4", "nf4"), Train(init="loftq"), 1)
    with pytest.raises(FourscoreError, match="`init: pissa` needs the 16-bit weights"):
        split_base(tmp_path / "nf4", Train(init="pissa"), tmp_path / "split")


def short_row() -> list[Row]:
    return [Row("1", 1, ["1"], [text_message("user", "a")], "b", [])]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{method: rslora, init: eva}", "`init: eva` gives layers ranks of their own"),
        ("{lora_plus: 0.5}", "`train.lora_plus`: Input should be greater than or equal to 1"),
        ("{init: svd}", "`train.init`: Input should be 'lora', 'eva', 'loftq', 'pissa' or 'olora'"),
        ("{method: qdora}", "`train.method`: Input should be 'lora', 'rslora' or 'dora'"),
    ],
)
def test_the_study_file_says_what_is_wrong(line: str, error: str) -> None:
    text = 'study: a\nmodel: {name: b}\ndata: {source: c.jsonl, choices: [x, y], prompt: {user: "{{ q }}", answer: "{{ a }}"}}\n'
    parse_study(text + "train: {method: dora, init: eva, lora_plus: 16}\n")
    with pytest.raises(FourscoreError, match=error) as raised:
        parse_study(text + f"train: {line}\n")
    assert "study:4" in str(raised.value)
    assert "\n" not in str(raised.value)
