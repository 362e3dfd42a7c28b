"""The loss equals the one that transformers computes from full logits, for architectures that differ at the head."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fourscore.files import FourscoreError
from fourscore.train.batches import Example, collate
from fourscore.train.loss import CHUNK, AnswerLoss

SMALL = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
NETWORKS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5, sliding_window=8)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():
        parameter.data *= 3  # logits large enough for a cap or a scale to show
        parameter.requires_grad_(False)
    trained = dict(network.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    trained.requires_grad_(True)
    return network


def rows() -> list[Example]:
    torch.manual_seed(4)
    shapes = [(30, 4), (17, 3), (9, 8), (30, 29)]
    return [Example(i, tuple(torch.randint(1, 307, (n,)).tolist()), p, "") for i, (n, p) in enumerate(shapes)]


def transformers_loss(network: nn.Module, example: Example) -> torch.Tensor:
    """One row alone, full logits, transformers' own loss: a mean over its answer tokens."""
    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, : example.prompt_length] = -100
    return network(input_ids=ids, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_transformers_loss_and_gradient(name):
    network, examples = make(name), rows()
    weight = network.model.layers[0].self_attn.q_proj.weight
    expected = sum(transformers_loss(network, e) * e.supervised for e in examples)
    expected.backward()
    wanted, weight.grad = weight.grad, None

    loss = AnswerLoss(network)
    batch = collate(examples, range(len(examples)))
    got = loss(batch.input_ids, batch.positions, batch.targets)
    got.backward()
    assert loss.plain is (name in ("llama", "qwen2"))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(weight.grad, wanted, rtol=2e-4, atol=1e-6 * wanted.abs().max().item())


def test_chunks_do_not_show():
    """More answer tokens than one chunk holds give torch's own cross-entropy."""
    network = make("llama")
    torch.manual_seed(5)
    example = Example(1, tuple(torch.randint(1, 307, (2 * CHUNK + 50,)).tolist()), 2, "")
    batch = collate([example], (0,))
    got = AnswerLoss(network)(batch.input_ids, batch.positions, batch.targets)
    assert got.item() == pytest.approx(transformers_loss(network, example).item() * example.supervised, rel=1e-6)


def test_the_head_sees_answer_positions_only():
    network, examples = make("gemma2"), rows()
    seen = []
    network.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    batch = collate(examples, range(len(examples)))
    AnswerLoss(network)(batch.input_ids, batch.positions, batch.targets)
    assert seen == [sum(e.supervised for e in examples)]


def test_the_random_stream_is_left_alone():
    network, examples = make("llama").train(), rows()
    batch = collate(examples, (0,))
    before = torch.get_rng_state()
    AnswerLoss(network)(batch.input_ids, batch.positions, batch.targets)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_calls_its_head_otherwise_is_refused():
    network = make("llama")
    forward = network.forward

    def odd(input_ids, use_cache):
        network.lm_head(torch.zeros(1, 1, 32))
        return forward(input_ids=input_ids, use_cache=use_cache)

    network.forward = odd
    with pytest.raises(FourscoreError, match="calls its output head in a way"):
        batch = collate(rows(), (0,))
        AnswerLoss(network)(batch.input_ids, batch.positions, batch.targets)
