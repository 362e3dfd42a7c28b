"""AdamW on a GPU: bitsandbytes' paged one, whose state moves to the host's memory when the GPU is short of it (QLoRA, section 3).

Written for CUDA and never run on one; on a CPU its unpaged form is tested beside torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHARED = ("params", "lr", "betas", "eps", "weight_decay", "lr_ratio")  # what both kinds of AdamW know of a group, and ours


def paged(adamw: torch.optim.Optimizer) -> Any:
    """An AdamW that has done no step yet: itself for parameters on a CPU, bitsandbytes' paged AdamW for those on a GPU."""
    on_gpu = any(p.is_cuda for group in adamw.param_groups for p in group["params"])
    return to_bitsandbytes(adamw) if on_gpu else adamw


def to_bitsandbytes(adamw: torch.optim.Optimizer) -> Any:
    """bitsandbytes' paged AdamW over the same groups, with state in f32."""
    from bitsandbytes.optim.adamw import PagedAdamW

    return PagedAdamW([{k: group[k] for k in SHARED if k in group} for group in adamw.param_groups])


def state_tensors(adamw: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state of a parameter by kind, numbers as tensors; empty before the first step."""
    return {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in adamw.state.get(parameter, {}).items()}


def put_state(adamw: Any, parameter: nn.Parameter, kinds: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. bitsandbytes' buffers are its own to make: they are filled, not replaced."""
    if isinstance(adamw, torch.optim.AdamW):
        adamw.state[parameter] = kinds
        return
    for group_index, group in enumerate(adamw.param_groups):
        for index, other in enumerate(group["params"]):
            if other is parameter:
                adamw.init_state(group, parameter, group_index, index)
    state = adamw.state[parameter]
    for kind, value in kinds.items():
        if isinstance(state[kind], Tensor):
            state[kind].copy_(value)
        else:
            state[kind] = int(value)
