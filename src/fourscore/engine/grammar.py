"""Answers that follow a JSON Schema: llguidance says at each step which tokens may come next.

It was chosen among the maintained libraries because it is one small wheel for every Python (abi3, 3 MB, MIT) that depends on
nothing (xgrammar asks for torch, triton and tvm), and needs no compilation per schema that would stop the other streams
(outlines-core builds an automaton first). Needs the extra `fourscore[serve]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourscore.files import FourscoreError


class Grammars:
    """Makes matchers for one tokenizer; what llguidance knows of it is built once, at the first schema (a second)."""

    def __init__(self, tokenizer: Any, stop_ids: set[int], vocabulary: int) -> None:
        self._tokenizer, self._stop_ids, self._vocabulary = tokenizer, sorted(stop_ids), vocabulary
        self._known: Any = None

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A fresh matcher. A schema that cannot be followed is a FourscoreError."""
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise FourscoreError("JSON Schema output needs llguidance", todo="pip install 'fourscore[serve]'") from error
        if self._known is None:
            try:
                self._known = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stop_ids)
            except (ValueError, AttributeError) as error:
                raise FourscoreError(f"JSON Schema output does not know this tokenizer ({error})", todo="leave out the schema") from error
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise FourscoreError(f"the JSON Schema cannot be read ({error})", where="schema", todo="mend the schema") from error
        fault = llguidance.LLMatcher.validate_grammar(grammar, self._known)
        if fault:
            raise FourscoreError(
                f"the JSON Schema cannot be followed ({fault.splitlines()[0]})", where="schema", todo="leave out what is named"
            )
        return Matcher(llguidance.LLMatcher(self._known, grammar))


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next: bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[:vocabulary]
        allowed[: len(known)] = known
        return allowed

    def take(self, token: int) -> None:
        """The token was chosen."""
        if not self._matcher.consume_token(token):
            raise FourscoreError(f"the grammar stopped: {self._matcher.get_error()}", where="schema", todo="simplify the schema")

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())
