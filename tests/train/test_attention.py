"""Attention equals torch's in f64 within rounding, and a query's bits depend on nothing but what it sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fourscore.nf4 import kernels, replace_linears
from fourscore.train import ops
from fourscore.train.attention import fused_attention, fused_rope
from fourscore.train.fused import fused

NATIVE = kernels.available()[:-1]


def make(batch, heads, groups, queries, keys, width, dtype, seed=0):
    """q, k, v as transformers' projections hand them over: values [b, t, h, d] seen as [b, h, t, d]."""
    torch.manual_seed(seed)
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return [torch.randn(batch, t, h, width).to(dtype).transpose(1, 2) for t, h in shapes]


def shares(q, k, scale):
    """Soft-max of the scores, with the mask written out."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return (q @ k.transpose(2, 3) * scale).masked_fill(~seen, float("-inf")).softmax(-1)


def magnitudes(q, k, v, dy, share, groups, scale):
    """What the sums behind q's, k's and v's gradients would be if nothing cancelled: roundings are relative to this."""
    q, k, v, dy = q.abs(), k.abs(), v.abs(), dy.abs()
    slope = share * (dy @ v.transpose(2, 3) + (share @ v * dy).sum(-1, keepdim=True)) * scale
    of_keys = (x.unflatten(1, (groups, -1)).sum(2) for x in (slope.transpose(2, 3) @ q, share.transpose(2, 3) @ dy))
    return slope @ k, *of_keys


def check(q, k, v, dy, scale):
    """Against torch in f64."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    each, rounding = q.shape[1] // k.shape[1], 2e-6 if q.dtype == torch.float32 else 2.0**-8
    keys, values = (x.repeat_interleave(each, 1) for x in wide[1:])
    share = shares(wide[0], keys, scale)
    wanted = share @ values
    gradients = torch.autograd.grad(wanted, wide, dy.double())
    out, normaliser = ops.attention(q, k, v, scale)
    assert (out - wanted).norm() <= rounding * (share @ values.abs()).norm()
    largest = magnitudes(wide[0], keys, values, dy.double(), share, k.shape[1], scale)
    got = ops.attention_backward(dy, q, k, v, out, normaliser, scale)
    for mine, gradient, size in zip(got, gradients, largest, strict=True):
        assert (mine - gradient).norm() <= rounding * size.norm()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "length", "width"),
    [
        (1, 1, 1, 64),
        (3, 1, 2, 32),
        (9, 3, 17, 64),
        (4, 1, 63, 80),
        (3, 3, 64, 128),
        (8, 1, 65, 32),
        (4, 4, 160, 64),
        (3, 1, 161, 80),
        (4, 2, 300, 64),
    ],
)
def test_forward_and_gradients(backend, dtype, heads, groups, length, width):
    q, k, v = make(2, heads, groups, length, length, width, dtype)
    with kernels.use(backend):
        check(q, k, v, torch.randn(2, heads, length, width).to(dtype), width**-0.5)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(NATIVE),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(0, 140),
    st.integers(1, 70),
    st.booleans(),
)
def test_a_chunk_after_a_cache_of_any_size(backend, groups, each, queries, cached, width, half):
    """Odd widths, odd places, memory in [b, h, t, d] order for once."""
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v = make(1, groups * each, groups, queries, queries + cached, width, dtype)
    with kernels.use(backend):
        check(q.contiguous(), k, v.contiguous(), torch.randn(q.shape).to(dtype), 0.3)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_s_bits_depend_on_what_it_sees_alone(backend, dtype):
    """Not on its neighbours in the batch, on chunks, on what follows, or on threads."""
    q, k, v = make(3, 6, 2, 150, 150, 64, dtype)
    before = torch.get_num_threads()
    with kernels.use(backend):
        try:
            torch.set_num_threads(1)
            whole, normaliser = ops.attention(q, k, v, 0.1)
            dy = torch.randn_like(whole)
            gradients = ops.attention_backward(dy, q, k, v, whole, normaliser, 0.1)
            for first, end in ((0, 1), (0, 77), (63, 65), (77, 150), (149, 150), (5, 130)):
                part, _ = ops.attention(q[1:2, :, first:end], k[1:2, :, :end], v[1:2, :, :end], 0.1)
                assert torch.equal(part, whole[1:2, :, first:end])
            torch.set_num_threads(3)
            assert torch.equal(ops.attention(q, k, v, 0.1)[0], whole)
            for a, b in zip(gradients, ops.attention_backward(dy, q, k, v, whole, normaliser, 0.1), strict=True):
                assert torch.equal(a, b)
        finally:
            torch.set_num_threads(before)


def test_scores_far_apart_stay_finite():
    q, k, v = make(1, 1, 1, 100, 100, 64, torch.bfloat16)
    out, normaliser = ops.attention(1000 * q, 10 * k, v, 1.0) if NATIVE else pytest.skip("no kernels")
    assert out.isfinite().all()
    for gradient in ops.attention_backward(torch.ones_like(out), 1000 * q, 10 * k, v, out, normaliser, 1.0):
        assert gradient.isfinite().all()


def llama(dtype: torch.dtype, window: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2}
    network = MistralForCausalLM(MistralConfig(**shape, sliding_window=window)) if window else LlamaForCausalLM(LlamaConfig(**shape))
    replace_linears(network)
    network = get_peft_model(network.to(dtype), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return network.train()


def step(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 90))
    network.zero_grad()
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", kernels.available())
def test_a_fused_llama_has_the_loss_and_gradients_of_a_plain_one(backend):
    with kernels.use(backend):
        network = llama(torch.float32)
        wanted, gradients = step(network)
        with fused(network):
            got, of_fused = step(network)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        for name, g in gradients.items():
            torch.testing.assert_close(of_fused[name], g, rtol=1e-3, atol=2e-5 * g.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", kernels.available())
def test_in_bf16_a_fused_llama_is_as_near_to_f32_as_a_plain_one(backend):
    loss, truth = step(llama(torch.bfloat16).float())
    with kernels.use(backend):
        network = llama(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            plain_loss, plain = step(network)
        with fused(network):
            got, of_fused = step(network)

    def error(of: dict[str, torch.Tensor]) -> float:
        return sum(((of[n] - g).norm() / g.norm()).item() for n, g in truth.items())

    assert error(of_fused) < 1.1 * error(plain)
    assert abs(got - loss) < 0.01 * loss
    assert abs(plain_loss - loss) < 0.01 * loss


def test_a_sliding_window_is_left_to_transformers():
    """The window cuts: equal to the plain model only where the kernels were not asked."""
    network = llama(torch.float32, window=16)
    wanted, gradients = step(network)
    with fused_attention(), fused_rope(network) as names:
        assert names == ["transformers.models.mistral.modeling_mistral"]
        got, of_fused = step(network)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for name, g in gradients.items():
        torch.testing.assert_close(of_fused[name], g, rtol=1e-4, atol=1e-5 * g.abs().max().item(), msg=name)


def test_another_rotary_embedding_is_left_alone():
    """GPT-J's kind turns neighbours, not halves."""
    import types

    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    network = nn.Module()
    network.__class__ = type("Attention", (nn.Module,), {"__module__": modeling_cohere.__name__})
    before = modeling_cohere.apply_rotary_pos_emb, modeling_llama.apply_rotary_pos_emb
    assert isinstance(before[0], types.FunctionType)
    with fused_rope(network) as names:
        assert names == []
        assert modeling_cohere.apply_rotary_pos_emb is before[0]
    with fused_rope(llama(torch.float32)):
        assert modeling_llama.apply_rotary_pos_emb is not before[1]
    assert modeling_llama.apply_rotary_pos_emb is before[1]
