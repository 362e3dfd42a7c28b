"""Batches: nothing lost, nothing twice, never over the limit, the same for the same seed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourscore.files import FourscoreError
from fourscore.train.batches import MICRO_TOKENS, Example, collate, micro_batches, plan_steps
from fourscore.train.prior import label_prior_loss

lengths = st.lists(st.integers(2, 400), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(16, 2048), st.integers(1, 3), st.integers(0, 5))
def test_every_row_once_an_epoch_and_no_step_over_its_tokens(lengths, tokens_per_step, epochs, seed):
    steps = plan_steps(lengths, tokens_per_step, epochs, seed)
    rows = [i for step in steps for micro in step for i in micro]
    assert sorted(rows) == sorted(list(range(len(lengths))) * epochs)
    for step in steps:
        held = [i for micro in step for i in micro]
        assert len(held) == 1 or sum(lengths[i] for i in held) <= tokens_per_step
        for micro in step:
            assert len(micro) == 1 or max(lengths[i] for i in micro) * len(micro) <= MICRO_TOKENS
    assert steps == plan_steps(lengths, tokens_per_step, epochs, seed)


def test_another_seed_and_another_epoch_take_another_order():
    one = plan_steps([10] * 50, 100, 1, seed=1)
    assert one != plan_steps([10] * 50, 100, 1, seed=2)
    two = plan_steps([10] * 50, 100, 2, seed=1)
    assert two[: len(one)] == one
    assert two[len(one) :] != one


def test_a_part_of_an_epoch_takes_that_share_of_the_rows():
    rows = [i for step in plan_steps([10] * 40, 100, 1.25, seed=0) for micro in step for i in micro]
    assert len(rows) == 50


def test_the_last_step_is_no_left_over():
    """21 rows of 50 tokens at 1,000 a step: 11 and 10 rows, not 20 and one."""
    sizes = [sum(map(len, step)) for step in plan_steps([50] * 21, 1000, 1, seed=0)]
    assert sizes == [11, 10]


def test_a_row_longer_than_a_step_is_a_step_of_its_own():
    steps = plan_steps([10, 10, 5000, 10], 100, 1, seed=0)
    assert ((2,),) in steps


def test_length_sorting_keeps_padding_small():
    lengths = [40 + 7 * (i % 30) for i in range(300)]
    padded = sum(max(lengths[i] for i in m) * len(m) for step in plan_steps(lengths, 1024, 1, 0) for m in step)
    assert padded < 1.2 * sum(lengths)


def test_short_rows_share_a_pass_where_a_pass_costs_more_than_padding():
    assert len(micro_batches(range(4), [10, 11, 12, 13])) == 1
    assert len(micro_batches(range(3), [10, 10, 900])) == 2


def test_positions_point_before_each_answer_token():
    examples = [Example(1, (5, 6, 7, 8, 9), 3, "a"), Example(2, (5, 6, 7), 2, "b")]
    batch = collate(examples, (0, 1))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch.positions.tolist() == [2, 3, 4 + 1]
    assert batch.targets.tolist() == [8, 9, 7]
    assert (batch.tokens, batch.padding) == (8, 2)


def test_label_prior_worked_by_hand():
    """Three `a`, one `b`: P(a) = 3/5, P(b) = 1/5, unseen 1/5; answers of two tokens."""
    from math import log

    def row(answer: str) -> Example:
        return Example(1, (1, 2, 3), 1, answer)

    training = [row("a")] * 3 + [row("b")]
    assert label_prior_loss(training, [row("a")]) == pytest.approx(-log(3 / 5) / 2)
    assert label_prior_loss(training, [row("b"), row("never seen")]) == pytest.approx(-log(1 / 5) / 2)


def test_a_row_without_a_trainable_token_is_named(monkeypatch):
    """The chat template refuses most of them; this is the last guard."""
    from fourscore.data import Row, template
    from fourscore.data.template import Rendered
    from fourscore.train.batches import render_examples

    monkeypatch.setattr(template, "render_row", lambda tokenizer, messages, answer: Rendered([1, 2, 3], 3))
    with pytest.raises(FourscoreError, match="row 32 has no trainable token"):
        render_examples(None, [Row("0" * 16, 32, ["x"], [], "", [])])
