"""How far an arm's next-token distributions are from base-16bit's, on the same tokens. This screens and explains; it never decides.

The reference writes, for every position of prompt and gold answer (a beginning that several prompts share counts once), its TOP
likeliest tokens with their log-probabilities, and the log-probability of all others together. The other arms evaluate theirs
on the same tokens. The KL divergence over these TOP + 1 buckets is never more than the KL over the whole vocabulary
(data-processing inequality: merging outcomes cannot increase a divergence; Cover and Thomas, Elements of Information Theory,
2.8), so what is reported is a lower bound (SmolLM2-135M in NF4 against bf16: 0.86 of the whole).
Flips are answers that turned from right to wrong or back (Dutta et al. 2024, arXiv 2407.09141).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourscore.evaluate.items import Item
from fourscore.files import FourscoreError, atomic_file

TOP = 128


@dataclass(frozen=True)
class Top:
    """The reference's distributions. ids: int32 [positions, k], likeliest first; logprobs: float32 [positions, k]; rest: float32
    [positions], log-probability of all other tokens; offsets: int64 [sequences + 1] into the positions; tokens: int32, the
    sequences themselves, one after another."""

    ids: np.ndarray
    logprobs: np.ndarray
    rest: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray

    def save(self, path: Path) -> None:
        """Write top.npz."""
        with atomic_file(path, "wb") as file:
            np.savez_compressed(file, ids=self.ids, logprobs=self.logprobs, rest=self.rest, offsets=self.offsets, tokens=self.tokens)


def load_top(path: Path) -> Top:
    """Read top.npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Top(file["ids"], file["logprobs"], file["rest"], file["offsets"], file["tokens"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FourscoreError(f"not readable ({error})", where=str(path), todo="run the step of base-16bit again") from None


def store_top(sequences: Sequence[list[int]], distributions: Iterable[torch.Tensor], k: int = TOP) -> Top:
    """The reference's record. distributions: per sequence [n - 1 or more, vocabulary] natural log-probabilities of the next token."""
    ids, logprobs, rest, offsets = [], [], [], [0]
    for new, full in zip(_new_positions(sequences), distributions, strict=True):
        values = full[new].float()
        top = values.topk(min(k, values.shape[-1]), dim=-1)
        ids.append(top.indices.to(torch.int32).numpy())
        logprobs.append(top.values.numpy())
        rest.append(_rest(values, top.indices).numpy())
        offsets.append(offsets[-1] + len(values))
    return Top(np.concatenate(ids), np.concatenate(logprobs), np.concatenate(rest), np.array(offsets, np.int64), _flat(sequences))


def divergence(reference: Top, sequences: Sequence[list[int]], distributions: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || arm) in nats over the buckets, and whether both hold the same token likeliest; each [positions].

    FourscoreError when the sequences are not the reference's first ones.
    """
    tokens = _flat(sequences)
    if not np.array_equal(tokens, reference.tokens[: len(tokens)]):
        raise FourscoreError(
            "the reference was measured on other tokens", where="top.npz", todo="run the step of base-16bit again with this model and data"
        )
    kl, same = [], []
    for i, (new, full) in enumerate(zip(_new_positions(sequences), distributions, strict=True)):
        here = slice(int(reference.offsets[i]), int(reference.offsets[i + 1]))
        values = full[new].float()
        ids = torch.from_numpy(reference.ids[here].astype(np.int64))
        q = torch.cat([values.gather(-1, ids), _rest(values, ids)[:, None]], dim=-1).double()
        p = torch.cat([torch.from_numpy(reference.logprobs[here]), torch.from_numpy(reference.rest[here])[:, None]], dim=-1).double()
        kl.append(_kl(p, q).numpy())
        same.append((values.argmax(-1) == ids[:, 0]).numpy())
    return np.concatenate(kl), np.concatenate(same)


def _new_positions(sequences: Sequence[list[int]]) -> list[slice]:
    """Of each sequence, the positions whose context no sequence before it has: a system prompt under every question would
    otherwise be counted once a question, and a few of its tokens would be all that a 99th percentile sees."""
    seen: dict[tuple[int, int], int] = {}  # (node, token) -> node of a trie of all contexts
    slices = []
    for sequence in sequences:
        node, first = 0, len(sequence) - 1
        for place, token in enumerate(sequence[:-1]):
            if (node, token) not in seen:
                first = min(first, place)
                seen[node, token] = len(seen) + 1
            node = seen[node, token]
        slices.append(slice(first, len(sequence) - 1))
    return slices


def _flat(sequences: Sequence[list[int]]) -> np.ndarray:
    return np.array([token for sequence in sequences for token in sequence], np.int32)


def _rest(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of everything but `ids`: [positions], -inf where nothing else is left."""
    return values.scatter(-1, ids, -math.inf).logsumexp(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of exp(p) (p - q) over the last axis; a bucket without mass in p adds nothing. Buckets are normalised again, because
    float32 leaves their sum a millionth away from one, which could turn a KL of zero negative."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    terms = torch.where(p == -math.inf, torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0.0)


def describe(kl: np.ndarray, same: np.ndarray, items: Mapping[str, list[Item]], reference: Mapping[str, list[Item]]) -> dict[str, Any]:
    """The `fidelity` section of the measures. perplexity_ratio: over the gold answers' tokens of all desk items, arm over reference."""
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_p999": float(np.quantile(kl, 0.999)),
        "same_top": float(same.mean()),
        "perplexity_ratio": perplexity_ratio(items["desk"], reference["desk"]),
        "tokens": len(kl),
        "flips": {task: flips(items[task], reference[task]) for task in items if task in reference},
        "note": f"KL in nats a token over the reference's {TOP} likeliest tokens, the rest as one: a lower bound; shared beginnings once",
    }


def paired(items: Sequence[Item], reference: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Items of both arms that answer the same rendered question; one without a partner is a FourscoreError."""
    known = {(item["id"], item["prompt_hash"]): item for item in reference}
    pairs = [(item, known[key]) for item in items if (key := (item["id"], item["prompt_hash"])) in known]
    if len(pairs) != len(items):
        raise FourscoreError(
            f"{len(items) - len(pairs)} of {len(items)} items are not the reference's",
            where="items",
            todo="run the step of base-16bit again",
        )
    return pairs


def flips(items: Sequence[Item], reference: Sequence[Item]) -> dict[str, int | None]:
    """How many answers turned from right to wrong or back, by each score; null where the task has no such score."""
    pairs = paired(items, reference)
    counted: dict[str, int | None] = {"items": len(pairs)}
    for name, field in (("likelihood", "correct"), ("generated", "generated_correct")):
        both = [(a[field], b[field]) for a, b in pairs if a[field] is not None and b[field] is not None]
        counted[name] = sum(a != b for a, b in both) if both else None
    return counted


def perplexity_ratio(items: Sequence[Item], reference: Sequence[Item]) -> float | None:
    """exp of the difference in mean nats a gold-answer token: over 1 means the arm finds the right answers less likely."""
    pairs = paired(items, reference)
    tokens = sum(a["answer_tokens"] for a, _ in pairs)
    if not tokens:
        return None
    gap = sum(a["answer_nll"] - b["answer_nll"] for a, b in pairs) / tokens
    return math.exp(gap) if gap < 700 else None
