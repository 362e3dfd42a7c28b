"""The engine: scores and generates with a loaded model, over transformers' own modelling code.

It works on token ids: what a prompt looks like is the business of `data`, what an answer is worth that of `evaluate`.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fourscore.engine.adapters import Adapters
from fourscore.engine.answer import Answer, Generation
from fourscore.engine.decode import DecodeState, batches, decode, decode_again
from fourscore.engine.grammar import Grammars
from fourscore.engine.interface import Rows, StepRunner
from fourscore.engine.loop import Loop, Stats
from fourscore.engine.packing import packs
from fourscore.engine.runner import Runner
from fourscore.engine.sampling import Sampling
from fourscore.engine.scoring import cached_logits
from fourscore.engine.sequence import Sequence as Queued
from fourscore.engine.stream import Stream
from fourscore.engine.transformers_runner import TransformersRunner
from fourscore.engine.trial import caching_fault, chunking_fault, packing_fault
from fourscore.files import FourscoreError
from fourscore.progress import say

if TYPE_CHECKING:
    from fourscore.model import Model

PACK_TOKENS = 256  # attention grows with a pack, the matrix products gain little above this (measured on CPUs, 128 to 1,024)
CACHE_TOKENS = 16_384  # of all caches together: 0.4 GB for SmolLM2-135M in 16 bits, 0.5 GB for a 1B shape
ROWS = 64  # logits are turned to f32 this many rows at a time: 12 MB at 49,152 words

Request = tuple[Sequence[int], Sequence[int]]


class Engine:
    """Runs a model. `model` needs `network` and `tokenizer`; `adapters` are PEFT folders by name.

    path: "packed" computes what requests share once and pads nothing; "plain" runs one sequence a forward pass, the other path of
    the A/A floor. native=True: networks that the native runner knows run there (`fast`; `slow_because` says why one does not). It
    is not the default yet: it takes no adapters, and the arms of a study must run on one path. The others run in transformers' code,
    and those that cannot be packed there (found by a trial on construction) run plain, and it is said. cache_tokens: of all
    sequences under way and kept together.
    """

    def __init__(
        self,
        model: Model,
        adapters: dict[str, Path] | None = None,
        path: Literal["packed", "plain"] = "packed",
        *,
        pack_tokens: int = PACK_TOKENS,
        cache_tokens: int = CACHE_TOKENS,
        native: bool = False,
    ) -> None:
        if path not in ("packed", "plain"):
            raise FourscoreError(f"no engine path `{path}`", todo="use `packed` or `plain`")
        self.model, self.tokenizer = model, model.tokenizer
        self.adapters = Adapters(model.network, adapters or {})
        self.runner = Runner(self.adapters.network)
        self.pack_tokens, self.cache_tokens = pack_tokens, cache_tokens
        self.stop_ids = _stop_ids(model)
        self.path: Literal["packed", "plain"] = path
        self.slow_because = self._no_native(native, path)
        self._cached: bool | None = None
        self._grammars = Grammars(self.tokenizer, self.stop_ids, self.runner.vocabulary)
        self._work, self._making = threading.RLock(), threading.Lock()
        self._made: Loop | None = None
        if path == "packed" and not self.fast:
            with self._running(None):
                fault = packing_fault(self.runner)
            if fault:
                say(f"{type(self.runner.network).__name__}: {fault}; every sequence is computed by itself")
                self.path = "plain"

    @property
    def fast(self) -> bool:
        """Whether the native runner computes."""
        return self.slow_because is None

    @property
    def max_length(self) -> int | None:
        """Most tokens that go into the network at once; None where it has no limit."""
        return self.runner.limit

    def score(
        self, requests: Sequence[Request], adapter: str | None = None, *, advance: Callable[[int], object] | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats, natural log, summed over tokens) of each continuation after its context, in the order given.

        requests: (context ids, continuation ids), neither empty. The flag is lm-eval's is_greedy: every token of the
        continuation is the likeliest (the first of equals). advance: called with the number of requests just finished.
        """
        sequences = [self._sequence(i, context, continuation) for i, (context, continuation) in enumerate(requests)]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, logits, rows in self._logits(sequences, [len(r[1]) for r in requests], adapter):
            targets = torch.tensor([t for m in members for t in requests[m][1]], device=logits.device)
            likelihoods, greedy = _pick_out(logits, torch.tensor([r for path in rows for r in path], device=logits.device), targets)
            at = 0
            for member in members:
                n = len(requests[member][1])
                results[member] = (float(likelihoods[at : at + n].sum(dtype=torch.float64)), bool(greedy[at : at + n].all()))
                at += n
            if advance is not None:
                advance(len(members))
        return results

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, adapter: str | None = None
    ) -> Iterator[Tensor]:
        """For each sequence, in order: log-probabilities of all words at every predicted token, f32 [len - start, vocabulary].

        Row t predicts `sequence[start + t]`; `starts` (default 1 each) says from which token on, at least 1. One sequence's
        rows are held at a time besides the logits of its pack.
        """
        starts = [1] * len(sequences) if starts is None else starts
        pairs = [(s[:start], s[start:]) for s, start in zip(sequences, starts, strict=True)]
        inputs = [self._sequence(i, context, rest) for i, (context, rest) in enumerate(pairs)]
        for chunk in _consecutive(inputs, self.pack_tokens):
            found: dict[int, Tensor] = {}
            for members, logits, rows in self._logits([inputs[i] for i in chunk], [len(pairs[i][1]) for i in chunk], adapter):
                for member, row in zip(members, rows, strict=True):
                    found[member] = logits[torch.tensor(row, device=logits.device)]
            for i in range(len(chunk)):
                yield torch.log_softmax(found.pop(i), dim=-1, dtype=torch.float32)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        adapter: str | None = None,
        *,
        stop_strings: Sequence[str] = (),
        advance: Callable[[int], object] | None = None,
    ) -> list[Generation]:
        """Answers, in the order of the prompts. Greedy at temperature 0, else sampled, the same for the same seed.

        An answer stops at the model's own end tokens (its generation config's and the tokenizer's), at `stop_ids`, before one
        of `stop_strings`, or after `max_new_tokens`. A prompt that leaves no room for them is a FourscoreError.
        """
        if isinstance(stop_strings, str):
            raise FourscoreError("stop_strings is a string", todo="give a list of strings")
        asked = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=tuple(stop_strings), stop_ids=tuple(stop_ids or ())
        )
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise FourscoreError("an empty prompt", where=f"prompt {i}", todo="begin it with the model's first token")
            self._fits(len(prompt) + max_new_tokens, f"prompt {i}", "shorten it or lower max_new_tokens")
        seen: Counter[tuple[int, ...]] = Counter()  # equal prompts are asked again, not copied
        answers = []
        for prompt in prompts:
            answers.append(Answer(prompt, asked, self.stop_ids, self.tokenizer, copy=seen[tuple(prompt)]))
            seen[tuple(prompt)] += 1
        if self.fast:
            self._loop.finish([self._enqueue(p, a, adapter, threaded=False) for p, a in zip(prompts, answers, strict=True)], advance)
        else:
            for batch in batches(prompts, max_new_tokens, 0 if not self._caches() else self.runner.rope_switch):
                with self._running(adapter):
                    self._decode([list(prompts[i]) for i in batch], [answers[i] for i in batch])
                if advance is not None:
                    advance(len(batch))
        return [answer.generation() for answer in answers]

    def _decode(self, prompts: list[list[int]], answers: list[Answer]) -> None:
        switch, longest, most = self.runner.rope_switch, max(map(len, prompts)), answers[0].sampling.max_new_tokens
        crosses = switch is not None and longest <= switch < longest + most  # the cache would be of other frequencies
        if self._caches() and not crosses:
            decode(self.runner, prompts, answers)
        else:
            for prompt, answer in zip(prompts, answers, strict=True):
                decode_again(self.runner, prompt, answer)

    def _caches(self) -> bool:
        """Whether the network decodes with a cache; tried once, and said where it does not."""
        if self._cached is None:
            with self._running(None):
                fault = caching_fault(self.runner)
            if fault:
                say(f"{type(self.runner.network).__name__}: {fault}; every new token computes its whole sequence again")
            self._cached = fault is None
        return self._cached

    def submit(self, ids: Sequence[int], sampling: Sampling | None = None, adapter: str | None = None) -> Stream:
        """Begin to answer a prompt while others are answered; from any thread. The answer comes through the stream.

        Errors at once: an unknown adapter, a schema that cannot be followed, a prompt that leaves no room for max_new_tokens.
        """
        sampling = sampling or Sampling()
        matcher = None if sampling.schema is None else self._grammars.matcher(sampling.schema)
        answer = Answer(ids, sampling, self.stop_ids, self.tokenizer, matcher=matcher)
        return self._enqueue(ids, answer, adapter, threaded=True).stream

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Load another adapter, between two steps of what is under way."""
        if self.fast:
            raise FourscoreError("the native runner takes no adapters yet", todo="make the engine without native=True")
        with self._loop.work:
            self.adapters.add(name, Path(folder))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter: new requests for it are refused at once, those under way are waited for."""
        self.adapters.check(name)
        self._loop.drain(name, lambda: self.adapters.remove(name))

    def stats(self) -> Stats:
        """What runs and waits, the cache, tokens in and out per adapter."""
        return self._loop.stats()

    def close(self, *, drain: bool = True) -> None:
        """Refuse new streams, finish those under way (or cancel them: drain=False), and give their memory back."""
        self._loop.close(drain=drain)

    def _no_native(self, native: bool, path: str) -> str | None:
        if not native or path == "plain":
            return "it was not asked for"
        if self.adapters.names:
            return "it has adapters"
        from fourscore.engine.fast import supported

        return supported(self.model)

    @property
    def _loop(self) -> Loop:
        """Made at the first use: what the network can do is tried then."""
        with self._making:
            if self._made is None:
                runner: StepRunner
                if self.fast:
                    from fourscore.engine.fast import FastRunner
                    from fourscore.engine.paged_runner import PagedRunner

                    runner = PagedRunner(FastRunner(self.model), self.cache_tokens)
                else:
                    caches = self._caches()
                    with self._running(None):
                        fault = chunking_fault(self.runner) if caches else None
                    runner = TransformersRunner(self.runner, self.adapters, self.cache_tokens, caches=caches, chunks=fault is None)
                self._made = Loop(runner, self._work, partial(self._running, None))
            return self._made

    def _enqueue(self, prompt: Sequence[int], answer: Answer, adapter: str | None, *, threaded: bool) -> Queued:
        loop, most = self._loop, answer.sampling.max_new_tokens
        if not prompt:
            raise FourscoreError("an empty prompt", where="the prompt", todo="begin it with the model's first token")
        self._fits(len(prompt) + most, "the prompt", "shorten it or lower max_new_tokens")
        if len(prompt) + most + loop.runner.page > loop.runner.limit:
            raise FourscoreError(
                f"{len(prompt)} tokens and {most} new ones, and the cache takes {loop.runner.limit}",
                where="the prompt",
                todo="shorten it, lower max_new_tokens, or make the engine with more cache_tokens",
            )
        self.adapters.check(adapter)
        return loop.submit(lambda number: Queued(number, prompt, answer, adapter), threaded=threaded)

    def prefill(self, prompt: Sequence[int], adapter: str | None = None) -> DecodeState:
        """Compute a prompt and choose the first token (`state.next_id`, the likeliest): what a reader waits for at first."""
        self._fits(len(prompt) + 1, "the prompt", "shorten it")
        self.adapters.check(adapter)
        with self._loop.work:
            cache = self._loop.runner.new()
        state = DecodeState(list(prompt), -1, adapter, cache)
        weakref.finalize(state, self._loop.release, cache)
        return self._advance(state, list(prompt))

    def step(self, state: DecodeState) -> int:
        """One decoding step: feed `state.next_id`, choose the token after it, keep it in the state and return it."""
        self._fits(len(state.ids) + 1, "the sequence", "stop earlier")
        state.ids.append(state.next_id)
        return self._advance(state, [state.next_id]).next_id

    def _advance(self, state: DecodeState, ids: list[int]) -> DecodeState:
        state.next_id = int(self._loop.alone(Rows(state.cache, ids, 1, state.adapter))[-1].argmax())
        return state

    def _sequence(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """What the network reads to score a request: all but the last token."""
        if not continuation:
            raise FourscoreError("an empty continuation", where=f"request {number}", todo="give at least one token to score")
        if not context:
            raise FourscoreError("an empty context", where=f"request {number}", todo="begin with the model's first token (BOS)")
        self._fits(len(context) + len(continuation) - 1, f"request {number}", "shorten it; nothing is cut")
        return [*context, *continuation[:-1]]

    def _fits(self, tokens: int, where: str, todo: str) -> None:
        if self.runner.limit is not None and tokens > self.runner.limit:
            raise FourscoreError(f"{tokens} tokens, and the model takes {self.runner.limit}", where=where, todo=todo)

    def _logits(
        self, sequences: list[list[int]], tails: list[int], adapter: str | None
    ) -> Iterator[tuple[list[int], Tensor, list[list[int]]]]:
        """Logits of the last `tails[i]` places of each sequence: (numbers of the sequences, logits, each one's rows in them)."""
        if self.fast:
            yield from cached_logits(self._loop, sequences, tails, adapter, self.pack_tokens)
            return
        alone = [self.path == "plain" or (self.runner.reach is not None and len(s) > self.runner.reach) for s in sequences]
        together = [i for i, lonely in enumerate(alone) if not lonely]
        most = min((n for n in (self.runner.reach, self.runner.limit) if n is not None), default=None)
        for pack in packs([sequences[i] for i in together], self.pack_tokens, most):
            members = [together[m] for m in pack.members]
            tail = [path[len(path) - tails[m] :] for m, path in zip(members, pack.paths, strict=True)]
            places = sorted({place for path in tail for place in path})
            row = {place: r for r, place in enumerate(places)}
            with self._running(adapter):
                logits = self.runner.packed(pack, places)
            yield members, logits, [[row[place] for place in path] for path in tail]
        for i, lonely in enumerate(alone):
            if lonely:
                with self._running(adapter):
                    logits = self.runner.plain(sequences[i], tails[i])
                yield [i], logits, [list(range(tails[i]))]

    @contextmanager
    def _running(self, adapter: str | None) -> Iterator[None]:
        """Nobody else, evaluation mode, no gradients, this adapter; as it was afterwards."""
        with self._work:
            training = self.runner.network.training
            if training:  # walks through every module: not for each token of a model that is in evaluation mode anyway
                self.runner.network.eval()
            try:
                with self.adapters.selected(adapter), torch.inference_mode():
                    yield
            finally:
                if training:
                    self.runner.network.train()


def _pick_out(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at its row of the logits (f32), and whether it is that row's likeliest word."""
    found = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    greedy = torch.empty(len(rows), dtype=torch.bool, device=logits.device)
    for start in range(0, len(logits), ROWS):
        part = logits[start : start + ROWS]
        here = ((rows >= start) & (rows < start + ROWS)).nonzero().flatten()
        found[here] = torch.log_softmax(part, dim=-1, dtype=torch.float32)[rows[here] - start, targets[here]]
        greedy[here] = part.max(dim=-1).indices[rows[here] - start] == targets[here]  # max is four times as fast as argmax in bf16
    return found, greedy


def _consecutive(sequences: list[list[int]], budget: int) -> Iterator[range]:
    """Runs of neighbours of about `budget` tokens."""
    start, size = 0, 0
    for i, sequence in enumerate(sequences):
        if i > start and size + len(sequence) > budget:
            yield range(start, i)
            start, size = i, 0
        size += len(sequence)
    if start < len(sequences):
        yield range(start, len(sequences))


def _stop_ids(model: Model) -> set[int]:
    """The ids at which the model ends its turn: its generation config's and the tokenizer's."""
    configured = getattr(model.network.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in (*ids, model.tokenizer.eos_token_id) if i is not None}
