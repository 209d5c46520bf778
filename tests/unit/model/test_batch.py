"""Packing keeps every sample whole, once, within the budget, and lets nothing cross a sequence boundary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_tp.errors import RequestError
from apollo_tp.model.batch import empty_share, pack, pack_pairs
from apollo_tp.wire.commands import PreferencePair, Sample

MAX_TOKENS = 50


def _sample(length: int, first_token: int = 0) -> Sample:
    """Tokens count up from ``first_token``; weights are distinct, so that a shifted one shows."""
    return Sample(list(range(first_token, first_token + length)), [0.0, *(0.5 + i for i in range(1, length))])


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, MAX_TOKENS), max_size=40))
def test_every_sample_is_in_one_batch_within_the_budget(lengths: list[int]) -> None:
    batches = pack([_sample(length) for length in lengths], MAX_TOKENS)
    assert sorted(i for batch in batches for i in batch.sample_index) == list(range(len(lengths)))
    assert all(batch.num_tokens <= MAX_TOKENS for batch in batches)
    assert all(batch.lengths == tuple(lengths[i] for i in batch.sample_index) for batch in batches)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=40))
def test_no_two_batches_would_fit_into_one(lengths: list[int]) -> None:
    """No two batches would fit into one: else the later one's samples would have gone into the earlier one."""
    batches = pack([_sample(length) for length in lengths], MAX_TOKENS)
    sizes = sorted(batch.num_tokens for batch in batches)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > MAX_TOKENS
    assert empty_share(sum(lengths), len(batches), MAX_TOKENS) == pytest.approx(
        1 - sum(lengths) / (MAX_TOKENS * len(batches))
    )


def test_packing_depends_on_the_samples_alone() -> None:
    """Ranks pack on their own: equal input must give equal batches, ties in the order given."""
    samples = [_sample(length, 100 * i) for i, length in enumerate([7, 7, 30, 7, 21])]
    first, second = pack(samples, MAX_TOKENS), pack(samples, MAX_TOKENS)
    assert [b.sample_index for b in first] == [b.sample_index for b in second] == [(0, 1, 2), (3, 4)]


def test_targets_and_weights_are_shifted_within_each_sequence() -> None:
    """Position t predicts token t + 1 with that token's weight; the last position of a sequence predicts nothing."""
    (batch,) = pack([_sample(3, 10), _sample(1, 20), _sample(2, 30)], MAX_TOKENS)
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.weights.tolist() == [1.5, 2.5, 0.0, 0.0, 1.5, 0.0]
    assert batch.targets[batch.loss_positions].tolist() == [11, 12, 31]
    assert batch.weight_sum == 5.5
    assert batch.num_loss_tokens == 3


def test_pairs_stay_in_one_batch() -> None:
    """Both sides of a preference pair are scored in the same micro-batch, preferred first."""
    pairs = [PreferencePair(_sample(n), _sample(n + 1), 0.0, 0.0) for n in (20, 9, 3, 14)]
    batches = pack_pairs(pairs, MAX_TOKENS)
    for batch in batches:
        assert all(
            b == a + 1 and a % 2 == 0 for a, b in zip(batch.sample_index[::2], batch.sample_index[1::2], strict=True)
        )
    assert sorted(i for batch in batches for i in batch.sample_index) == list(range(8))


def test_a_pair_may_fill_a_micro_batch_and_no_more() -> None:
    """The limit itself is allowed, as the message says; what is refused is named as the pair and the side that it is."""
    (batch,) = pack_pairs([PreferencePair(_sample(20), _sample(MAX_TOKENS - 20), 0.0, 0.0)], MAX_TOKENS)
    assert batch.lengths == (20, MAX_TOKENS - 20)
    good, large = (PreferencePair(_sample(20), _sample(n), 0.0, 0.0) for n in (5, MAX_TOKENS - 19))
    with pytest.raises(RequestError, match=r"^pairs\[1\]: got 51 tokens in both sides, expected 2 to 50$"):
        pack_pairs([good, large], MAX_TOKENS)
    with pytest.raises(RequestError, match=r"^pairs\[1\]\.rejected: got 0 tokens, expected 1 to 50$"):
        pack_pairs([good, PreferencePair(_sample(20), Sample([], []), 0.0, 0.0)], MAX_TOKENS)


@pytest.mark.parametrize(
    ("sample", "complaint"),
    [
        (Sample([], []), r"samples\[1\]: got 0 tokens, expected 1 to 50"),
        (_sample(51), r"samples\[1\]: got 51 tokens, expected 1 to 50"),
        (Sample([1, 2], [0.0]), r"samples\[1\]: got 1 weights, expected one per token \(2\)"),
        (Sample([1, 2], [1.0, 1.0]), r"samples\[1\]: got weights\[0\]=1.0, expected 0"),
    ],
)
def test_a_bad_sample_is_refused_by_name(sample: Sample, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        pack([_sample(5), sample], MAX_TOKENS)


@pytest.mark.parametrize(
    ("preferred", "rejected", "field"),
    [
        (_sample(5), _sample(0), "pairs[1].rejected"),
        (_sample(MAX_TOKENS + 1), _sample(1), "pairs[1].preferred"),
        (_sample(5), Sample([1, 2], [0.0]), "pairs[1].rejected"),
        (Sample([1], [1.0]), _sample(5), "pairs[1].preferred"),
        (_sample(MAX_TOKENS // 2), _sample(MAX_TOKENS // 2 + 1), "pairs[1]"),
    ],
)
def test_the_side_of_the_pair_that_cannot_be_packed_is_named(preferred: Sample, rejected: Sample, field: str) -> None:
    """By its pair's index, not by one that counts sides."""
    fine = PreferencePair(_sample(MAX_TOKENS // 2), _sample(MAX_TOKENS // 2), 0.0, 0.0)
    with pytest.raises(RequestError, match=re.escape(f"{field}: got ")) as caught:
        pack_pairs([fine, PreferencePair(preferred, rejected, 0.0, 0.0), fine], MAX_TOKENS)
    assert caught.value.field == field
    assert len(pack_pairs([fine], MAX_TOKENS)) == 1, "a pair of exactly the budget fits"
