"""The stored distributions against the whole ones: a bound, close, and exact where it can be."""

import math

import numpy as np
import pytest
import torch

from fourscore.evaluate.fidelity import divergence, flips, load_top, perplexity_ratio, store_top
from fourscore.files import FourscoreError

SEQUENCES = [[5, 6, 7, 8], [9, 10, 11]]


def full_kl(p, q):
    return torch.cat([(a.double().exp() * (a.double() - b.double())).sum(-1) for a, b in zip(p, q)]).numpy()


def distributions(vocabulary, seed, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.log_softmax(spread * torch.randn(len(s) - 1, vocabulary, generator=generator), -1) for s in SEQUENCES]


def near(distributions, seed, by=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.log_softmax(d + by * torch.randn(d.shape, generator=generator), -1) for d in distributions]


@pytest.mark.parametrize("seed", range(5))
def test_the_stored_kl_is_a_lower_bound_and_close_when_the_mass_is_on_top(seed):
    p = distributions(5000, seed)
    q = near(p, seed + 100)
    kl, _ = divergence(store_top(SEQUENCES, p), SEQUENCES, q)
    whole = full_kl(p, q)
    assert (kl <= whole + 1e-6).all()
    assert kl.mean() > 0.8 * whole.mean()


def test_with_the_whole_vocabulary_stored_the_kl_is_exact():
    p, q = distributions(50, 1), distributions(50, 2)
    kl, same = divergence(store_top(SEQUENCES, p), SEQUENCES, q)
    np.testing.assert_allclose(kl, full_kl(p, q), rtol=1e-5)
    assert same.tolist() == [bool(a.argmax() == b.argmax()) for x, y in zip(p, q) for a, b in zip(x, y)]


def test_the_same_model_is_at_distance_zero():
    p = distributions(3000, 3, spread=8.0)
    kl, same = divergence(store_top(SEQUENCES, p), SEQUENCES, p)
    assert (kl >= 0).all()
    assert kl.max() < 1e-6
    assert same.all()


def test_two_buckets_by_hand():
    """p = (0.5, 0.25, 0.25), q = (0.25, 0.5, 0.25); the top token against the rest: 0.5 ln 2 + 0.5 ln(0.5 / 0.75)."""
    p = [torch.tensor([[0.5, 0.25, 0.25]]).log()]
    q = [torch.tensor([[0.25, 0.5, 0.25]]).log()]
    kl, same = divergence(store_top([[1, 2]], p, k=1), [[1, 2]], q)
    assert kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert not same[0]


def test_files_keep_the_values_and_other_tokens_are_refused(tmp_path):
    p, q = distributions(1000, 4), distributions(1000, 5)
    store_top(SEQUENCES, p).save(tmp_path / "top.npz")
    store_top(SEQUENCES, p).save(tmp_path / "again.npz")
    assert (tmp_path / "top.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    loaded = load_top(tmp_path / "top.npz")
    assert loaded.ids.dtype == np.int32
    assert loaded.logprobs.dtype == np.float32
    np.testing.assert_array_equal(divergence(loaded, SEQUENCES, q)[0], divergence(store_top(SEQUENCES, p), SEQUENCES, q)[0])
    assert len(divergence(loaded, SEQUENCES[:1], q[:1])[0]) == 3  # the first ones alone are fine
    with pytest.raises(FourscoreError, match="other tokens"):
        divergence(loaded, [[5, 6, 7, 9], [9, 10, 11]], q)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(FourscoreError, match="Run the step of base-16bit again"):
        load_top(tmp_path / "broken.npz")


def test_a_beginning_that_sequences_share_counts_once():
    """[1, 2, 3, 4] and [1, 2, 3, 5, 6] share the contexts 1, 12 and 123; the repeated sequence adds nothing."""
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4], [2, 2]]
    generator = torch.Generator().manual_seed(0)
    p = [torch.log_softmax(torch.randn(len(s) - 1, 40, generator=generator), -1) for s in sequences]
    kl, same = divergence(store_top(sequences, p), sequences, near(p, 1))
    assert len(kl) == len(same) == 3 + 1 + 0 + 1
    assert kl.min() > 0


def item(identity, correct, generated, nll, prompt="p"):
    return {
        "id": identity,
        "prompt_hash": prompt,
        "correct": correct,
        "generated_correct": generated,
        "answer_nll": nll,
        "answer_tokens": 2,
    }


def test_flips_count_answers_that_turned_in_either_direction():
    before = [item("a", True, True, 1.0), item("b", False, True, 2.0), item("c", True, False, 3.0)]
    after = [item("a", False, True, 2.0), item("b", True, True, 3.0), item("c", True, False, 4.0)]
    assert flips(after, before) == {"items": 3, "likelihood": 2, "generated": 0}
    assert perplexity_ratio(after, before) == pytest.approx(math.exp(3 / 6))
    assert flips([item("a", None, None, 1.0)], [item("a", None, None, 1.0)]) == {"items": 1, "likelihood": None, "generated": None}


def test_items_of_another_prompt_are_not_compared():
    with pytest.raises(FourscoreError, match="1 of 1 items"):
        flips([item("a", True, True, 1.0, prompt="q")], [item("a", True, True, 1.0)])
