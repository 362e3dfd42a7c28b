"""Where a LoRA adapter starts, other than at zero: at the quantisation error, along the data, or at the main part of the weights.

Each gives the same bits for the same seed, whatever order layers come in. Singular vectors are found by randomised subspace
iteration (arXiv 0909.4061) from a fixed sketch: only the products of a start matter, not the signs of its vectors.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fourscore.files import FourscoreError
from fourscore.model.device import device_of
from fourscore.model.dora import weight_tiles
from fourscore.nf4 import NF4Linear
from fourscore.progress import track

if TYPE_CHECKING:
    from fourscore.data import Row
    from fourscore.model.loading import Model

EXACT = 256  # up to this smaller side the whole decomposition is as cheap as a sketch
ITERATIONS = 4  # of the subspace; the error is then within a hundredth of the best possible one on the flat spectra seen here
EVA_TOKENS = 256  # tokens of one pass: directions settle after 20 to 30 passes whatever their size, and a pass costs as many tokens
EVA_PASSES = 300  # an end for data whose main directions never settle


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by the name that the base model gives the layer inside, sorted."""
    from peft.tuners.lora.layer import LoraLayer

    peft: Any = network
    return dict(sorted((name, m) for name, m in peft.get_base_model().named_modules() if isinstance(m, LoraLayer)))


def low_rank(matrix: Tensor, rank: int, *, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank], V [in, rank] of nearly the best approximation U S V^T of `matrix`, f32 [out, in]."""
    check_rank(matrix.shape, rank, name)
    sketch = 2 * rank + 8
    if min(matrix.shape) <= max(EXACT, 2 * sketch):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=sketch, niter=ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank]


def check_rank(shape: Sequence[int], rank: int, name: str) -> None:
    """A FourscoreError where a weight has fewer directions than the adapter wants of it."""
    if rank > min(shape):
        raise FourscoreError(
            f"rank {rank} is more than layer {name} has ({' x '.join(map(str, shape))})", where="train.rank", todo="lower `train.rank`"
        )


def principal(W: Tensor, rank: int, scale: float, kind: Literal["pissa", "olora"], *, name: str = "") -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] such that scale * B A is the part of W [out, in] (f32) that the base is to lose.

    pissa: the first singular directions (arXiv 2404.02948). olora: scale times the first columns of Q and rows of R of W = Q R (arXiv
    2406.01775).
    """
    if kind == "pissa":
        return _halves(*low_rank(W, rank, name=name), scale)
    check_rank(W.shape, rank, name)
    Q, R = torch.linalg.qr(W)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def _halves(U: Tensor, S: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with scale * B A = U S V^T, as large as each other."""
    root = (S / scale).sqrt()
    return (V * root).T.contiguous(), (U * root).contiguous()


def start_at_quantisation_error(model: Model) -> None:
    """LoftQ (arXiv 2310.08659) on a base that stays as it is: scale * B A is the best part of W - dequantised(W), W from the file."""
    from fourscore.model.rewrite import Weights

    weights = Weights(model.path)
    layers = lora_layers(model.network)
    odd = [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), NF4Linear)]
    if odd or any(weights.is_quantised(f"{name}.weight") for name in layers):
        what = f"layer {odd[0]} is not quantised" if odd else "the folder holds no 16-bit original"
        raise FourscoreError(
            f"`init: loftq` starts at what quantising lost, and {what}", where=str(model.path), todo="use weights: nf4 of a 16-bit folder"
        )
    with track("LoftQ", len(layers), "layers") as bar:
        for name, layer in layers.items():
            (adapter,) = layer.active_adapters
            lost = weights.layer(name).float().clone()
            row = 0
            for tile in weight_tiles(layer.get_base_layer()):
                lost[row : row + len(tile)] -= tile.cpu()
                row += len(tile)
            A, B = _halves(*low_rank(lost, layer.r[adapter], name=name), layer.scaling[adapter])
            for part, value in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
                part.weight.data = value.to(part.weight.device)
            weights.release()
            bar.advance()


def start_along_data(model: Model, rows: Sequence[Row], seed: int) -> None:
    """EVA (arXiv 2410.07170), PEFT's own: A along the main directions of each layer's input, ranks dealt out where they explain most."""
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora.eva import get_eva_state_dict

    from fourscore.data.template import render_row

    network = model.network
    rank = network.peft_config["default"].r
    for name, layer in lora_layers(network).items():
        check_rank((layer.out_features, layer.in_features), 2 * rank, name)  # PEFT looks at twice as many directions
    ids = [render_row(model.tokenizer, row.messages, row.answer).ids for row in rows]
    device = device_of(network)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in _batches(ids, seed, max(EVA_TOKENS, 4 * rank))]
    if min(int(b["attention_mask"].sum()) for b in batches) < 2 * rank:
        raise FourscoreError(
            f"`init: eva` with rank {rank} needs at least {2 * rank} tokens of training rows", where="train.init", todo="lower `train.rank`"
        )
    keeps = "logits_to_keep" in inspect.signature(network.get_base_model().forward).parameters

    def run(net: Any, inputs: dict[str, Tensor]) -> Any:
        return net(**inputs, use_cache=False, **({"logits_to_keep": 1} if keeps else {}))

    with track("EVA, until directions settle", EVA_PASSES, "passes at most") as bar:
        found = get_eva_state_dict(network, _Endless(batches, bar), forward_fn=run, show_progress_bar=False)
    kept = {name: A.clone() for name, A in found.items()}
    initialize_lora_eva_weights(network, eva_state_dict=found)
    for name, layer in lora_layers(network).items():
        layer.lora_A["default"].weight.data = kept[f"base_model.model.{name}"].float().contiguous()  # PEFT rounds to the base's dtype
        layer.lora_B["default"].weight.data = torch.zeros_like(layer.lora_B["default"].weight.data, dtype=torch.float32)


class _Endless:
    """The batches again and again, as PEFT wants them until its directions settle; an error where they never do."""

    def __init__(self, batches: list[dict[str, Tensor]], bar: Any) -> None:
        self.batches, self.bar = batches, bar

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(itertools.cycle(self.batches)):
            if number > EVA_PASSES:
                raise FourscoreError(
                    f"EVA's directions did not settle in {EVA_PASSES} passes", where="train.init", todo="use `init: lora`, or more rows"
                )
            self.bar.advance()
            yield batch


def _batches(rows: Sequence[Sequence[int]], seed: int, tokens: int) -> list[dict[str, Tensor]]:
    """Shuffled rows, padded on the right, in batches of at least `tokens` tokens; what is left over joins the last one."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    groups: list[list[Sequence[int]]] = [[]]
    for row in order:
        if sum(map(len, groups[-1])) >= tokens:
            groups.append([])
        groups[-1].append(row)
    if len(groups) > 1 and sum(map(len, groups[-1])) < tokens:
        left = groups.pop()
        groups[-1] += left
    batches = []
    for group in groups:
        width = max(map(len, group))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in group])
        batches.append({"input_ids": ids, "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in group])})
    return batches
