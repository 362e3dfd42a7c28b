"""bitsandbytes' file layout of an NF4 weight: which tensors, under which names, and the JSON beside them."""

from __future__ import annotations

import json

import torch

from fourscore.files import FourscoreError
from fourscore.nf4.codec import BLOCK_SIZES, FLOATS, NESTED_BLOCK_SIZE, NF4Tensor, packed_bytes
from fourscore.nf4.plain import CODE

STATE = "quant_state.bitsandbytes__nf4"
# What follows "weight." in a state dict; "" is the packed weight itself.
PARTS = ("", "absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def to_tensors(q: NF4Tensor) -> dict[str, torch.Tensor]:
    """The tensors a state dict holds for a weight, by what follows "weight." ("" for the packed codes)."""
    facts: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {"": q.packed, "absmax": q.absmax, "quant_map": CODE.to(q.packed.device, copy=True)}
    if q.nested_absmax is not None and q.nested_code is not None:
        facts |= {"nested_blocksize": q.nested_block_size, "nested_dtype": "float32", "nested_offset": q.nested_offset}
        tensors |= {"nested_absmax": q.nested_absmax, "nested_quant_map": q.nested_code}
    tensors[STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: dict[str, torch.Tensor], where: str = "") -> NF4Tensor:
    """The weight back from such tensors; anything missing, of a wrong size or of another type than NF4 is a FourscoreError."""

    def wrong(what: str) -> FourscoreError:
        return FourscoreError(what, where=where, todo="the file must hold a bitsandbytes NF4 weight; fetch or quantise the model again")

    needed = {"", "absmax", "quant_map", STATE}
    if missing := needed - tensors.keys():
        names = ", ".join(sorted("weight" + ("." + m if m else "") for m in missing))
        raise wrong(f"not a complete NF4 weight, {names} is missing")
    try:
        facts = json.loads(bytes(tensors[STATE].tolist()))
        out_features, in_features = (int(v) for v in facts["shape"])
        block_size = int(facts["blocksize"])
        dtype = {str(d).removeprefix("torch."): d for d in FLOATS}[facts["dtype"]]
        quant_type = facts["quant_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise wrong(f"its quantisation record cannot be read ({error!r})") from None
    if quant_type != "nf4" or block_size not in BLOCK_SIZES:
        raise wrong(f"its type is {quant_type} in blocks of {block_size}, not NF4")
    if not torch.equal(tensors["quant_map"].cpu().float(), CODE):
        raise wrong("its 16 code values are not NF4's")
    shape = (out_features, in_features)
    blocks = -(-out_features * in_features // block_size)
    packed, absmax = tensors[""].view(torch.uint8), tensors["absmax"]
    nested = "nested_absmax" in tensors
    if packed.numel() != packed_bytes(shape) or absmax.numel() != blocks or absmax.dtype != (torch.uint8 if nested else torch.float32):
        raise wrong(f"{packed.numel()} bytes and {absmax.numel()} scales ({absmax.dtype}) do not make a weight of {list(shape)}")
    if not nested:
        return NF4Tensor(packed.reshape(-1, 1), absmax, shape, dtype, block_size)
    nested_block = int(facts.get("nested_blocksize", NESTED_BLOCK_SIZE))
    table, nested_absmax = tensors.get("nested_quant_map"), tensors["nested_absmax"]
    if table is None or table.numel() != 256 or nested_absmax.numel() != -(-blocks // nested_block) or "nested_offset" not in facts:
        raise wrong("its double quantisation is incomplete")
    return NF4Tensor(
        packed.reshape(-1, 1),
        absmax,
        shape,
        dtype,
        block_size,
        nested_absmax.float(),
        table.float(),
        float(facts["nested_offset"]),
        nested_block,
    )
