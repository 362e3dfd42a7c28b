"""Models of given shapes with random bf16 weights, kept in build/bench/models: what a step costs does not depend on the weights.

SmolLM2-135M alone is real; the others are Llamas of the usual sizes with its tokenizer and its vocabulary.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fourscore.files import FourscoreError, atomic_folder

MODELS = Path(__file__).resolve().parent.parent / "build" / "bench" / "models"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 49152
SHAPES = {
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8},
}


def parameters(shape: dict[str, int]) -> int:
    """Weights of such a Llama, norms left out; the head is the embedding."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * hidden * hidden * (1 + shape["num_key_value_heads"] / heads)
    return round(shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"]) + VOCABULARY * hidden)


def folder_of(name: str) -> Path:
    """The 16-bit folder of `135m` or of a name in SHAPES, made where it is not there yet. Too little disk or memory is a FourscoreError."""
    from fourscore.model import pull

    smol = pull("smollm2-135m-instruct")
    folder = MODELS / name
    if name == "135m" or folder.is_dir():
        return smol if name == "135m" else folder
    size = 2 * parameters(SHAPES[name])
    MODELS.mkdir(parents=True, exist_ok=True)
    require(size + 2**30, shutil.disk_usage(MODELS).free, "free disk", f"making the {name} shape")
    require(size + 2**30, available(), "free memory", f"making the {name} shape")
    with atomic_folder(folder) as part:
        make(part, smol, **SHAPES[name])
    return folder


def make(folder: Path, tokenizer: Path, **shape: int) -> Path:
    """A random Llama in bf16, written into `folder` (which exists), a tensor at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, dtype="bfloat16", pad_token_id=2, **shape)
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.dim() == 1
        else torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, p in network.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder)
    return folder


def available() -> int:
    """Bytes of memory that a new process could take."""
    import psutil

    return int(psutil.virtual_memory().available)


def require(needed: float, there: float, what: str, why: str) -> None:
    """A FourscoreError where less is there than needed."""
    if there < needed:
        raise FourscoreError(f"{why} needs {needed / 1e9:.1f} GB of {what}, {there / 1e9:.1f} are there", todo=f"make some {what}")
