"""lm-eval's tasks over the engine: `lm_eval.simple_evaluate(model=EngineLM(engine), tasks=[...])`.

Text becomes tokens as lm-eval's own HFLM does it, so the numbers are comparable; what HFLM cuts or ignores with a warning is
a FourscoreError here. Needs the extra `fourscore[lm-eval]`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fourscore.engine import Engine
from fourscore.files import FourscoreError
from fourscore.progress import track

MAX_NEW_TOKENS = 256  # HFLM's, for tasks that name no limit
WINDOW = 2048  # HFLM's window of a rolling likelihood, for networks without a limit
# Settings of a task that change nothing at these values. The second kind is not read by greedy decoding, as in transformers.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class EngineLM(TemplateLM):
    """An lm-eval model over an Engine.

    adapter: the engine's adapter to evaluate. max_length: tokens of a window in rolling likelihoods (default: the network's
    limit). seed: of sampled generations. An empty context is the tokenizer's BOS token, or EOS where it has no BOS, as in HFLM.
    """

    def __init__(self, engine: Engine, adapter: str | None = None, *, max_length: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.engine, self.adapter, self.seed = engine, adapter, seed
        self.tokenizer: Any = engine.tokenizer
        self.max_length = max_length or engine.max_length or WINDOW

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and its template in lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text. Special tokens as the tokenizer adds them, but no second BOS before a text that begins with it."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's own template writes it. A template that refuses it (a system message, say) is a FourscoreError."""
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise FourscoreError(
                f"the chat template refuses this chat: {error}", todo="leave out the system message, or the template"
            ) from error

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, continuation), _, ids in requests:
            if not ids:
                raise FourscoreError(
                    f"no token is left of the continuation {continuation!r}", todo="mend the task's `target_delimiter` or choices"
                )
        with track("likelihoods", len(requests), "requests") as bar:
            scores = self.engine.score([(c, t) for _, c, t in requests], self.adapter, advance=bar.advance)
        for (text, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts after the prefix token, in windows of `max_length`; each token is predicted once."""
        texts = [request.args[0] for request in requests]
        windows = [
            [make_disjoint_window(w) for w in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)]
            for text in texts
        ]
        pairs = [window for of_text in windows for window in of_text]
        with track("rolling likelihoods", len(pairs), "windows") as bar:
            scores = iter(self.engine.score(pairs, self.adapter, advance=bar.advance))
        totals = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts written after each context, cut before the first stop string. Settings that are not supported are FourscoreErrors."""
        groups: dict[tuple[int, float, tuple[str, ...]], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[self._settings(dict(request.args[1]))].append(i)
        texts = [""] * len(requests)
        with track("generations", len(requests), "requests") as bar:
            for (max_new_tokens, temperature, until), members in groups.items():
                answers = self.engine.generate(
                    [self.tok_encode(requests[i].args[0]) for i in members],
                    max_new_tokens,
                    temperature,
                    self.seed,
                    stop_ids=[token for s in until if (token := self._special_id(s)) is not None],
                    adapter=self.adapter,
                    stop_strings=until,
                    advance=bar.advance,
                )
                for i, answer in zip(members, answers, strict=True):
                    texts[i] = postprocess_generated_text(answer.text, list(until), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[int, float, tuple[str, ...]]:
        """(max new tokens, temperature, stop strings) of a task's generation settings."""
        left: dict[str, Any] = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        until = handle_stop_sequences(left.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
        max_new_tokens, sampled = int(left.pop("max_gen_toks")), bool(left.pop("do_sample", False))
        temperature = float(left.pop("temperature", 0.0))
        if sampled and temperature == 0:
            raise FourscoreError("do_sample without a temperature", where="generation_kwargs", todo="give a temperature above 0")
        for name, value in left.items():
            if name in SAMPLING and (not sampled or value == SAMPLING[name]):
                continue
            if name not in NEUTRAL or value != NEUTRAL[name]:
                raise FourscoreError(f"`{name}: {value}` is not supported", where="generation_kwargs", todo="leave it out of the task")
        return max_new_tokens, temperature if sampled else 0.0, tuple(s for s in until if s)

    def _special_id(self, text: str) -> int | None:
        """The id of a stop string that is one special token (decoding leaves those out, so the text never shows it)."""
        return self.tokenizer.convert_tokens_to_ids(text) if text in self.tokenizer.all_special_tokens else None
