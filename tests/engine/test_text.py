"""Streamed text is the decoded text, cut before the first stop string, wherever tokens begin and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fourscore.engine.text import Text


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


ALPHABET = "abé 好😀\n.#"  # one to four bytes a character


def read(text: Text, ids: list[int]) -> tuple[list[str], list[int]]:
    """The pieces and the tokens as a reader of the stream gets them."""
    pieces, given = [], []
    for token in ids:
        stopped = text.add(token)
        piece, numbers = text.rest() if stopped else text.certain()
        pieces.append(piece)
        given += numbers
        if stopped:
            return pieces, given
    piece, numbers = text.rest()
    return [*pieces, piece], given + numbers


@given(st.text(ALPHABET, max_size=30), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_make_the_text_before_the_first_stop(tokenizer: Any, written: str, stop: list[str], data: st.DataObject) -> None:
    parts, at = [], 0  # encoded in parts, so that tokens end at odd places, in the middle of characters' bytes too
    while at < len(written):
        size = data.draw(st.integers(1, 6))
        parts += tokenizer.encode(written[at : at + size], add_special_tokens=False)
        at += size
    whole = tokenizer.decode(parts)
    text = Text.of(tokenizer, stop)
    pieces, numbers = read(text, parts)
    ends = [found for s in stop if (found := whole.find(s)) >= 0]
    # What ends first in time wins: a longer stop string may begin earlier and still be completed later, by the same token or not.
    taken = next((n for n in range(1, len(parts) + 1) if any(s in tokenizer.decode(parts[:n]) for s in stop)), None)
    if taken is None:
        assert not text.stopped
        assert not ends
        assert "".join(pieces) == whole
        assert numbers == list(range(len(parts)))
    else:
        seen = tokenizer.decode(parts[:taken])
        want = seen[: min(seen.find(s) for s in stop if s in seen)]
        assert text.stopped
        assert len(text.ids) == taken
        assert "".join(pieces) == want == text.value
        assert numbers == list(range(text.kept))
        assert tokenizer.decode(parts[: text.kept]).startswith(want.rstrip("\ufffd"))
        if text.kept > 0:
            assert not tokenizer.decode(parts[: text.kept - 1]).startswith(want)  # one token fewer would not write it


@given(st.lists(st.integers(0, 49151), max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_tokens_make_their_decoded_text(tokenizer: Any, ids: list[int]) -> None:
    """Random tokens: broken characters, special tokens, and more of them than the window that is decoded again."""
    pieces, numbers = read(Text.of(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert numbers == list(range(len(ids)))


def test_a_long_answer_is_not_decoded_again_from_its_start(tokenizer: Any) -> None:
    lengths = []

    def decode(ids: Any) -> str:
        lengths.append(len(ids))
        return str(tokenizer.decode(ids))

    text = Text(decode)
    for token in tokenizer.encode("All work and no play makes Jack a dull boy. " * 60):
        text.add(token)
        text.certain()
    assert len(text.ids) > 600
    assert max(lengths) < 100


def test_a_tokenizer_that_cleans_spaces_takes_nothing_back() -> None:
    words = ["do", " n", "'t", " go", " ,", " he", " said", " ."]

    class Cleans:
        clean_up_tokenization_spaces = True

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(words[i] for i in ids).replace(" n't", "n't").replace(" ,", ",").replace(" .", ".")

    pieces, _ = read(Text.of(Cleans()), list(range(8)))
    assert "".join(pieces) == "don't go, he said."
    assert len([p for p in pieces if p]) > 2
