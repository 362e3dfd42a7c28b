"""The fused LoRA layer computes what PEFT's own forward computes, and its gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.nf4 import replace_linears
from fourscore.train.attention import _ShortAttention
from fourscore.train.fused import fused, fused_norms
from fourscore.train.lora import fused_lora


def make(nf4: bool, dtype: torch.dtype, dropout: float = 0.0, **lora) -> nn.Module:
    """Qwen2 has biases on q, k and v. B is not zero, so that A has a gradient."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    network = Qwen2ForCausalLM(config)
    if nf4:
        replace_linears(network)
    network = get_peft_model(network.to(dtype), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", lora_dropout=dropout, **lora))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return network.train()


def step(network: nn.Module, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    ids = torch.randint(0, 64, (3, 20))
    network.zero_grad()
    logits = network(input_ids=ids).logits.float()
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("nf4", [True, False])
def test_equal_to_peft_in_f32(nf4):
    network = make(nf4, torch.float32)
    wanted, gradients = step(network)
    with fused_lora(network) as names:
        assert len(names) == 14
        got, fused = step(network)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_in_bf16_it_rounds_no_worse_than_peft_under_autocast():
    """Both against the same weights computed in f32; the mean over batches, since one batch's errors vary twofold."""
    whole = make(True, torch.bfloat16).float()
    network = make(True, torch.bfloat16)
    outputs, gradients = [0.0, 0.0], [0.0, 0.0]
    for seed in range(12):
        exact, exact_gradients = step(whole, seed)
        with torch.autocast("cpu", torch.bfloat16):
            plain = step(network, seed)
        with fused_lora(network):
            got = step(network, seed)
        for side, (logits, grads) in enumerate((plain, got)):
            outputs[side] += (logits - exact).norm().item()
            gradients[side] += sum(((grads[n] - g).norm() / g.norm()).item() for n, g in exact_gradients.items())
    assert outputs[1] < 1.1 * outputs[0]
    assert gradients[1] < 1.1 * gradients[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_share_an_input_share_a_function_and_the_others_do_not(dropout):
    """q, k and v leave one node in the graph; two layers called with tensors of their own leave one each."""
    network = make(True, torch.float32, dropout)
    attention = network.get_submodule("base_model.model.model.layers.1.self_attn")
    x = torch.randn(2, 5, 64, requires_grad=True)
    with fused_lora(network):
        torch.manual_seed(3)
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        node = q.grad_fn.next_functions[0][0]
        assert node is k.grad_fn.next_functions[0][0] is v.grad_fn.next_functions[0][0]
        (k.square().sum() + v.sin().sum()).backward()  # q is not used: no gradient for its adapter, the right one for the others
        together = {n: p.grad for n, p in attention.named_parameters() if p.requires_grad}, x.grad
        network.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        first, second, third = x + 0, x + 0, x + 0
        alone_q, alone_k, alone_v = attention.q_proj(first), attention.k_proj(second), attention.v_proj(third)
        assert alone_q.grad_fn.next_functions[0][0] is not alone_k.grad_fn.next_functions[0][0]
        if not dropout:  # each alone draws masks for the others too
            (alone_k.square().sum() + alone_v.sin().sum()).backward()
            torch.testing.assert_close(x.grad, together[1], rtol=1e-5, atol=1e-5)
            for name, p in attention.named_parameters():
                if p.requires_grad and "o_proj" not in name and "q_proj" not in name:
                    torch.testing.assert_close(p.grad, together[0][name], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.cat([alone_q, alone_k, alone_v], -1), torch.cat([q, k, v], -1))


def test_changing_a_shared_input_between_the_layers_is_seen():
    network = make(True, torch.float32)
    attention = network.get_submodule("base_model.model.model.layers.0.self_attn")
    x = torch.randn(3, 64)
    with fused_lora(network):
        attention.q_proj(x)
        x.mul_(2)
        k = attention.k_proj(x)
    torch.testing.assert_close(k, attention.k_proj(x), rtol=1e-5, atol=1e-5)


def test_dropout_masks_the_adapter_alone_and_its_gradient_is_the_function_s():
    """Finite differences through the layer itself, with the mask fixed by the seed."""
    network = make(True, torch.float32, dropout=0.4)
    layer = network.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(5, 96, requires_grad=True)
    with fused_lora(network):

        def output(x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(2)
            return layer(x).double().sin().sum()

        output(x).backward()
        direction = torch.randn_like(x)
        for tensor, way in (
            (x, direction),
            (layer.lora_A["default"].weight, torch.randn(4, 96)),
            (layer.lora_B["default"].weight, torch.randn(64, 4)),
        ):
            analytic = (tensor.grad.double() * way).sum()
            tensor.data.add_(way, alpha=1e-3)
            up = output(x)
            tensor.data.sub_(way, alpha=2e-3)
            down = output(x)
            tensor.data.add_(way, alpha=1e-3)
            assert ((up - down) / 2e-3).item() == pytest.approx(analytic.item(), rel=2e-2)
        torch.manual_seed(2)
        dropped = layer(x)
        assert not torch.allclose(dropped, layer(x), atol=1e-3)  # another mask
    network.eval()
    assert torch.equal(layer(x), layer(x))


def test_gated_mlp_norms_and_short_rows_are_equal_to_transformers_in_f32():
    network = make(True, torch.float32)
    wanted, gradients = step(network)
    with fused_norms(network) as norms:
        assert len(norms) == 5
    with fused(network):
        assert "forward" in network.get_submodule("base_model.model.model.layers.0.mlp").__dict__
        got, of_fused = step(network)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_fused[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_another_norm_and_another_activation_are_left_alone():
    """Gemma2 multiplies by 1 + weight and gates by GELU."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    network = get_peft_model(Gemma2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted, gradients = step(network)
    with fused_norms(network) as norms:
        assert norms == []
    with fused(network):
        assert "forward" not in network.get_submodule("base_model.model.model.layers.0.mlp").__dict__
        got, of_fused = step(network)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_fused[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize(("heads", "groups", "length"), [(6, 2, 50), (3, 3, 7), (4, 1, 160)])
def test_short_attention_is_torch_s(heads, groups, length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 16, requires_grad=True) for h in (heads, groups, groups))
    dy = torch.randn(2, heads, length, 16)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    gradients = torch.autograd.grad(wanted, (q, k, v), dy)
    got = _ShortAttention.apply(q, k, v, 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, (q, k, v), dy), gradients, rtol=1e-4, atol=1e-5)


def test_variants_keep_peft_s_own_forward():
    network = make(False, torch.float32, use_dora=True)
    with fused_lora(network) as names:
        assert names == []


def test_outside_the_block_the_layers_are_peft_s():
    network = make(True, torch.float32)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with fused(network):
        pass
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert not any("forward" in module.__dict__ for module in network.modules())
