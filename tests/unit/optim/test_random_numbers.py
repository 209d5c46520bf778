"""Projections and bf16 writes: known answers, independence of slicing, and the error they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apollo_tp.config import Precision, PrecisionChoice
from apollo_tp.optim import projection, rounding
from tests.support.reference_optimizer import projection_matrix
from tests.support.special_values import NOT_FINITE, from_bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    """Python integers and int64 tensors both give Random123's known answers."""
    assert projection.philox4x32(counter, key) == expected
    tensors = projection.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in tensors) == expected


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("rank", [1, 3, 64, 200])
def test_a_slice_of_the_projection_is_the_projection_of_the_slice(kind, rank):
    """A rank that holds some columns, in any order, makes exactly those columns of the whole."""
    whole = projection_matrix(7, "a.weight", 3, torch.arange(50), rank, kind)
    columns = torch.tensor([40, 41, 3, 4, 5, 17])
    assert torch.equal(projection_matrix(7, "a.weight", 3, columns, rank, kind), whole[columns])


def test_packed_signs_of_many_parameters_come_from_one_call():
    """Keys and refreshes as tensors give what one call per parameter gives."""
    keys = [projection.stream_key(1, name, "projection") for name in ("a", "b")]
    columns = torch.cat([torch.arange(5), torch.arange(9)])
    owner = torch.tensor([0] * 5 + [1] * 9)
    first = torch.tensor([k[0] for k in keys])[owner]
    second = torch.tensor([k[1] for k in keys])[owner]
    batched = projection.sign_words((first, second), torch.tensor([4, 6])[owner], columns, 40)
    assert torch.equal(batched[:5], projection.sign_words(keys[0], 4, torch.arange(5), 40))
    assert torch.equal(batched[5:], projection.sign_words(keys[1], 6, torch.arange(9), 40))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_projection_keeps_lengths_on_average(kind):
    """P P^T has expectation I: the mean square is 1 / rank, columns are uncorrelated, refreshes and names differ."""
    rank, n = 64, 2000
    p = projection_matrix(0, "w", 0, torch.arange(n), rank, kind)
    # 128,000 entries: the standard error of the mean square is 1 / rank * sqrt(2 / 128,000) = 0.4 %
    assert abs(float(p.square().mean()) * rank - 1) < 0.02
    gram = (p @ p.T).fill_diagonal_(0)
    assert abs(float(gram.square().mean()) * rank - 1) < 0.02  # independent columns: variance 1 / rank each
    for other in (("w", 1), ("v", 0)):
        q = projection_matrix(0, other[0], other[1], torch.arange(n), rank, kind)
        assert abs(float((p * q).mean()) * rank) < 5 / np.sqrt(rank * n)


def test_join_undoes_split_to_24_bits():
    """bf16 + int8 hold an fp32 number to 2**-16 relative, and an already cut number exactly."""
    value = torch.randn(100_000) * torch.logspace(-20, 20, 100_000)
    upper, rest = rounding.split(value)
    joined = rounding.join(upper, rest)
    assert float(((joined - value) / value).abs().max()) <= 2.0**-16
    again = rounding.split(joined)
    assert torch.equal(again[0], upper)
    assert torch.equal(again[1], rest)
    nearest = value.bfloat16().float()
    # rounding twice (24 bits, then 16) may miss the nearest bf16 by 2**-8 of its ulp, which is at most 2**-7 |value|
    assert torch.all((upper.float() - value).abs() <= (nearest - value).abs() + value.abs() * 2.0**-15)


def test_a_remainder_of_16_bits_keeps_all_32():
    """And the served weight is the nearest bf16, but for ties, which go away from zero."""
    value = torch.randn(100_000) * torch.logspace(-20, 20, 100_000)
    value = torch.cat([value, from_bits([0, 1 << 31, 1, 0x007FFFFF, 0x3F7FFFFF, 0x3F807FFF, 0x3F808000, 0x7F000000])])
    upper, rest = rounding.split(value, torch.int16)
    assert torch.equal(rounding.join(upper, rest).view(torch.int32), value.view(torch.int32))
    ties = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(upper[~ties], value[~ties].bfloat16())


def test_remainders_of_both_sizes_are_read_as_each_other():
    """From 8 bits a weight stays the same number; from 16 it is the nearest of 24 bits, unless the bf16 would change."""
    rests = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    weight = torch.full((256,), 0.0173, dtype=torch.bfloat16)
    wide = rounding.convert_remainder(rests, torch.int16)
    assert torch.equal(rounding.join(weight, wide), rounding.join(weight, rests))
    assert torch.equal(rounding.convert_remainder(wide, torch.int8), rests)
    all_rests = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    narrow = rounding.convert_remainder(all_rests, torch.int8)
    wrong = (narrow.int() * 256 - all_rests.int()).abs()
    assert int(wrong[:-128].max()) <= 128
    assert int(wrong.max()) <= 255


@pytest.mark.parametrize(
    ("choice", "lr", "expected", "said"),
    [
        ("auto", 3e-6, Precision.remainder, "an int8 remainder (1 byte per weight), since optim.lr=3e-06 is not below"),
        ("auto", 2.9e-6, Precision.remainder16, "an int16 remainder (2 bytes per weight)"),
        ("auto", 1e-7, Precision.remainder16, "optim.lr is 1e-07"),
        *((precision.value, 1e-7, precision, "") for precision in Precision),
    ],
)
def test_auto_chooses_the_remainder_by_the_learning_rate(choice, lr, expected, said):
    """In one sentence for the log; what is asked for by name is not discussed."""
    precision, sentence = rounding.choose(PrecisionChoice(choice), lr)
    assert precision is expected
    assert said in sentence
    assert bool(said) == bool(sentence)


@pytest.mark.parametrize("how", ["remainder", "remainder16", "stochastic", "nearest"])
def test_a_nan_stays_one_in_every_precision(how):
    """The upper payloads ran over into the sign when they were rounded up: minus zero, and training went on."""
    value = from_bits(NOT_FINITE)
    weight = torch.zeros(len(value), dtype=torch.bfloat16)
    rest = torch.zeros(len(value), dtype=torch.int16 if how == "remainder16" else torch.int8)
    bits = torch.full((len(value),), 0xFFFF, dtype=torch.int32) if how == "stochastic" else None
    rounding.store(weight, rest if how.startswith("remainder") else None, value, bits)
    assert weight.isnan().all()
    assert rounding.join(weight, rest).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf])
    rests = rest[:2] if how.startswith("remainder") else None
    rounding.store(weight[:2], rests, infinite, None if bits is None else bits[:2])
    assert torch.equal(weight[:2].float(), infinite)


def test_random_bits_do_not_depend_on_the_cut():
    """Any rows and columns of the whole give the whole's bits, whatever the offset within a block of eight."""
    key = projection.stream_key(0, "w", "rounding")
    whole = rounding.random_bits(key, 5, torch.arange(20), torch.arange(37))
    rows, columns = torch.arange(4, 9), torch.cat([torch.arange(21, 37), torch.arange(3, 7)])
    assert torch.equal(rounding.random_bits(key, 5, rows, columns), whole[4:9][:, columns])
    assert whole.min() >= 0
    assert whole.max() < 1 << 16
    assert not torch.equal(whole, rounding.random_bits(key, 6, torch.arange(20), torch.arange(37)))


def test_stochastic_rounding_is_unbiased():
    """The mean over many steps is the fp32 value; both neighbours and only they occur."""
    key = projection.stream_key(0, "w", "rounding")
    value = torch.tensor([[0.01003, -0.5004, 3.1415, 1.0, 0.0, -1e-6, 7e8, 0.02]])
    rows, columns = torch.arange(1), torch.arange(8)
    draws = torch.stack([rounding.stochastic(value, rounding.random_bits(key, t, rows, columns)) for t in range(4000)])
    ulp = (value.abs() * 2**-7).clamp_min(1e-30)
    # one ulp times a Bernoulli variable: standard error of the mean <= 0.5 ulp / sqrt(4000) = 0.008 ulp; five of those
    assert torch.all(((draws.float().mean(0) - value) / ulp).abs() < 0.04)
    assert torch.all((draws.float() - value).abs() < 2 * ulp)


def _drift(precision: Precision, steps: int) -> float:
    """‖W - W0 - S‖ / ‖S‖ after ``steps`` updates of AdamW's size at lr 1e-5 whose exact sum is S."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 256, generator=generator) * 0.02).bfloat16()
    weight, total = start.clone(), torch.zeros(64, 256, dtype=torch.float64)
    remainder = torch.zeros(64, 256, dtype=torch.int8) if precision is Precision.remainder else None
    drift = torch.randn(64, 256, generator=generator)
    key, rows, columns = projection.stream_key(0, "w", "rounding"), torch.arange(64), torch.arange(256)
    for step in range(steps):
        # rho = 0.1: a tenth of each update is a drift that lasts; a = 0.2 is APOLLO at scale = small / rank
        update = 1e-5 * 0.2 * (0.1 * drift + 0.995 * torch.randn(64, 256, generator=generator))
        total += update.double()
        bits = rounding.random_bits(key, step, rows, columns) if precision is Precision.stochastic else None
        rounding.store(weight, remainder, rounding.join(weight, remainder) + update, bits)
    final = rounding.join(weight, remainder).double()
    return float((final - start.double() - total).norm() / total.norm())


def test_what_each_precision_keeps_of_1000_small_updates():
    """At lr 1e-5 the remainder keeps the sum to 5 %; nearest loses most of it; that control must fail."""
    assert _drift(Precision.remainder, 1000) < 0.05
    assert _drift(Precision.nearest, 1000) > 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_cuda_gives_the_bits_of_the_cpu(kind):
    """Projections are bit-identical on both devices, so that a job may move between them."""
    columns = torch.arange(17, 5000)
    expected = projection_matrix(5, "w", 2, columns, 72, kind)
    assert torch.equal(projection_matrix(5, "w", 2, columns.cuda(), 72, kind).cpu(), expected)
