"""An adapter merged into 16-bit weights: one transformers directory that needs neither PEFT nor fourscore.

Layer by layer from file to file, in f32, rounded once; then both networks answer a few rows and the difference is told. A merge that
loses what the adapter does is refused (others' have ruined models without a word: PEFT reads an NF4 layer's bytes as weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourscore import nf4
from fourscore.files import FourscoreError, atomic_folder, hash_file, read_json
from fourscore.model.adapter import WEIGHTS, check_adapter
from fourscore.model.folder import check_folder
from fourscore.model.loading import Model, load
from fourscore.model.names import PROVENANCE, describe
from fourscore.model.rewrite import Weights, linear_shapes, provenance, rewrite, skeleton
from fourscore.progress import say, track

PREFIX = "base_model.model."
# What a LoRA configuration may say that this file does not merge.
_REFUSED = (
    "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config", "use_qalora", "megatron_config",
)  # fmt: skip
_STARTED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT would change the base on loading such a configuration
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "To reset your password, open the settings page and choose",
    "def total(prices):\n    return sum(price for price in",
    "Two plus three makes five. Seven minus four makes",
)
# The merged network may be off by half of what the adapter changes, at most by a tenth of the logits' spread; but rounding the weights
# alone may be off by this share of it (measured on SmolLM2: 0.003 to 0.017 in bf16, 4e-6 in f32).
WORST = 0.1
ROUNDING = {torch.bfloat16: 0.02, torch.float32: 1e-3}


@dataclass(frozen=True)
class Merged:
    """A merged model. largest, mean: difference of its logits from the adapter network's. error: their root mean square over the
    spread of the logits; effect: the same for what the adapter changes at all. rows: how many were compared."""

    folder: Path
    into: str
    largest: float
    mean: float
    error: float
    effect: float
    rows: int


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer: W + scale * B A, with rows brought to length `magnitude` where there is one (DoRA)."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None

    def __call__(self, W: Tensor) -> Tensor:
        """The merged weight, f32 [out, in]."""
        merged = torch.addmm(W.float(), self.B.float(), self.A.float(), alpha=self.scale)
        if self.magnitude is not None:
            merged *= (self.magnitude.float() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        return merged


def merge(
    model_or_base: Model | str | Path,
    adapter: str | Path,
    out: str | Path,
    into: Literal["original", "dequantised"] = "original",
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[Sequence[int]] | None = None,
) -> Merged:
    """Merge a LoRA adapter (PEFT's folder) and write a transformers directory in `dtype` to `out`.

    into: `original`, the 16-bit weights of the base; or `dequantised`, the NF4 weights that the adapter was trained on. rows: token ids
    on which the merged network is compared with the adapter on its base (a few sentences where None). Errors: an adapter of another
    base, or with parts that cannot be merged; a layer that the base lacks; logits that are off, and then nothing is written.
    """
    base = check_folder(model_or_base.path if isinstance(model_or_base, Model) else Path(model_or_base))
    adapter, out = Path(adapter), Path(out)
    if into not in ("original", "dequantised") or dtype not in ROUNDING:
        raise FourscoreError(f"no merging into `{into}` as {dtype}", todo="use original or dequantised, and bfloat16 or float32")
    changes = read_changes(adapter, base)
    weights = Weights(base)
    shapes = linear_shapes(skeleton(base))
    if absent := sorted(name for name in changes if f"{name}.weight" not in weights):
        raise FourscoreError(
            f"the adapter changes layer {absent[0]}, which has no weights of its own in the base's file",
            where=str(adapter),
            todo="keep base and adapter apart",
        )
    if into == "original" and any(weights.is_quantised(f"{name}.weight") for name in shapes):
        raise FourscoreError("the base holds no 16-bit weights", where=str(base), todo="use into=dequantised, or the original")
    trained = read_json(adapter / PROVENANCE) if (adapter / PROVENANCE).exists() else {}
    form: dict[str, Any] = {"block_size": trained.get("block_size") or 64, "double_quant": trained.get("double_quant") is not False}
    note = f"{describe(base).name} with an adapter ({hash_file(adapter / WEIGHTS)[:12]}) merged into its {into} weights."

    with track(f"merge into the {into} weights", len(changes), "layers") as bar:

        def merged(tensor: str, W: Tensor) -> Tensor | None:
            layer = tensor.removesuffix(".weight")
            if into == "dequantised" and not weights.is_quantised(tensor):
                W = W.to(torch.bfloat16)  # as `load` has it before it quantises
                if layer in shapes:
                    W = nf4.dequantize(nf4.quantize(W, **form, name=tensor), torch.float32)
            if layer not in changes:
                return W
            bar.advance()
            return changes[layer](W)

        with atomic_folder(out) as part:
            rewrite(base, part, merged, dtype=dtype, told=provenance(base, f"{describe(base).name}-merged", f"merged-{into}", note))
            told = _compare(base, adapter, part, out, into, dtype, form, rows)
    say(
        f"{out}: logits differ from the adapter's by {told.mean:.2g} on average and {told.largest:.2g} at most ({told.rows} rows): "
        f"{told.error:.2%} of their spread, where the adapter changes {told.effect:.2%}"
    )
    return told


def read_changes(adapter: Path, base: Path | None = None) -> dict[str, Change]:
    """Layer -> what the adapter does to it, from a PEFT folder. Anything that is not plain LoRA, rsLoRA or DoRA is a FourscoreError."""
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    config = check_adapter(adapter, base)
    refused = [key for key in _REFUSED if config.get(key)]
    refused += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    refused += [f"init_lora_weights: {config['init_lora_weights']}"] if config.get("init_lora_weights") in _STARTED else []
    if config.get("peft_type") != "LORA" or refused:
        what = refused[0] if refused else f"peft_type: {config.get('peft_type')}"
        raise FourscoreError(f"an adapter with `{what}` cannot be merged", where=str(adapter), todo="keep base and adapter apart")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(adapter / WEIGHTS).items():
        layer, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        parts.setdefault(layer, {})[kind] = tensor
    wanted = {"lora_A", "lora_B", "lora_magnitude_vector"} if config.get("use_dora") else {"lora_A", "lora_B"}
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    changes = {}
    for layer, found in sorted(parts.items()):
        if found.keys() != wanted:
            odd = sorted(found.keys() ^ wanted)[0]
            raise FourscoreError(f"{odd} of layer {layer} is missing, or is none that can be merged", where=str(adapter))
        alpha: float = patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"])
        rank = len(found["lora_A"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        changes[layer] = Change(found["lora_A"], found["lora_B"], scale, found.get("lora_magnitude_vector"))
    return changes


def _compare(
    base: Path,
    adapter: Path,
    merged: Path,
    out: Path,
    into: str,
    dtype: torch.dtype,
    form: dict[str, Any],
    rows: Sequence[Sequence[int]] | None,
) -> Merged:
    """Both networks on the rows, one after the other in memory. A FourscoreError where the merged one is off."""
    full: Literal["f32", "bf16"] = "f32" if dtype == torch.float32 else "bf16"
    model = load(base, "nf4" if into == "dequantised" else full, adapter, device="cpu", **form)
    asked = [list(row) for row in rows] if rows else [model.tokenizer(text).input_ids for text in TEXTS]
    told = _logits(model.network, asked)
    with model.network.disable_adapter():
        untuned = _logits(model.network, asked)
    del model
    found = _logits(load(merged, full, device="cpu").network, asked)
    spread = (told - told.mean(-1, keepdim=True)).norm()
    error, effect = (float((logits - told).norm() / spread) for logits in (found, untuned))
    off = (found - told).abs()
    result = Merged(out, into, float(off.max()), float(off.mean()), error, effect, len(asked))
    if not error <= min(WORST, max(effect / 2, ROUNDING[dtype])):  # a NaN is refused too
        raise FourscoreError(
            f"the merged network's logits are off by {error:.1%} of their spread, where the adapter changes {effect:.1%}: not written",
            where=str(out),
            todo="keep base and adapter apart, or merge in float32",
        )
    return result


def _logits(network: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """f32 [tokens of all rows, vocabulary], computed in f32: what products in bf16 round off (5% of the spread on SmolLM2, as much as a
    light adapter changes) would hide what the merge did."""
    network.eval()
    compute_wide(network)
    with torch.inference_mode():
        return torch.cat([network(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows])


def compute_wide(network: nn.Module) -> None:
    """Let a network whose weights are in 16 bit compute in f32; a matrix is widened only while it is used."""
    each: Any
    for each in network.modules():
        dense, embeds = type(each) is nn.Linear, isinstance(each, nn.Embedding)
        if dense:
            each.forward = partial(_wide_linear, each)
        elif embeds:
            each.forward = partial(_wide_embedding, each.forward)
        else:
            for parameter in each.parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()


def _wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def _wide_embedding(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return forward(ids).float()
