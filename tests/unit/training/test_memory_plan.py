"""The arithmetic of the memory plan: lines, the length that fits, and what a refusal says."""

from __future__ import annotations

import pytest

from apollo_tp.training.memory_plan import (
    MARGIN,
    MemoryPlan,
    ProfiledRun,
    first_lengths,
    is_linear,
    longest_that_fits,
    out_of_memory,
    predict,
)

GB = 10**9


def test_lengths_double_and_never_exceed_the_maximum() -> None:
    assert first_lengths(65536, 100) == [256, 512, 1024]
    assert first_lengths(65536, 883) == [883, 1766, 3532], "whole chunks of logits at every length"
    assert first_lengths(65536, 10**6) == [4096, 8192, 16384], "a small vocabulary never fills a chunk"
    assert first_lengths(2048, 883) == [512, 1024, 2048]
    assert first_lengths(3, 883) == [2, 3]
    assert first_lengths(2, 883) == [2]


def recomputing(tokens: int) -> ProfiledRun:
    """Peaks of a forward pass, the head's segment (a large constant) and a layer's (steeper): 8.19B Qwen3, made up."""
    return ProfiledRun(tokens, (300 * tokens, 2 * GB + 300_000 * tokens, 100_000_000 + 520_000 * tokens))


def test_the_highest_line_at_the_asked_length_counts_even_if_another_was_highest_before() -> None:
    """One line through the peaks of 512 and 1024 tokens would miss 31 % of the need at 32768."""
    short = [recomputing(512), recomputing(1024)]
    one_line = predict([ProfiledRun(r.tokens, (max(r.peaks),)) for r in short], 32768)
    assert one_line == pytest.approx(0.69 * max(recomputing(32768).peaks), rel=0.01)
    assert [r.peaks.index(max(r.peaks)) for r in short] == [1, 1]
    assert predict(short, 32768) == max(recomputing(32768).peaks) == recomputing(32768).peaks[2]
    assert predict(short, 1024) == max(short[1].peaks), "what was measured is not extrapolated"
    assert predict([ProfiledRun(2, (7, 9))], 2) == 9


def test_a_need_that_bends_is_noticed() -> None:
    straight = [recomputing(n) for n in (256, 512, 1024)]
    curved = [ProfiledRun(n, (1000 * n * n + 50_000 * n,)) for n in (256, 512, 1024)]
    late = [ProfiledRun(n, (max(GB, 2_000_000 * n),)) for n in (256, 512, 1024)]
    assert is_linear(straight, 0)
    assert not is_linear(curved, 0)
    assert not is_linear(late, 0), "a constant hid the slope of the shorter ones"
    assert not is_linear(straight[:2], 0), "two points are always on a line"
    # 10 GB that were there before must not hide a bend of 5 %
    slightly = [ProfiledRun(n, (10 * GB + 100_000 * n + (5_000_000 if n == 1024 else 0),)) for n in (256, 512, 1024)]
    assert is_linear(slightly, 0)
    assert not is_linear(slightly, 10 * GB)


def test_the_longest_that_fits_is_exact() -> None:
    short = [recomputing(512), recomputing(1024)]
    limit = max(recomputing(5000).peaks)
    assert longest_that_fits(short, 32768, limit) == 5000
    assert longest_that_fits(short, 32768, limit - 1) == 4999
    assert longest_that_fits(short, 4096, limit) == 4096
    assert longest_that_fits(short, 32768, GB) == 0


def plan(**changes: int) -> MemoryPlan:
    values = {
        "rank": 1, "tokens": 65536, "gradients": 8 * GB, "activations": 30 * GB, "optimizer": GB,
        "available": 20 * GB, "largest": 21000,
    }  # fmt: skip
    return MemoryPlan(**(values | changes))


def test_activations_and_the_optimizer_s_temporaries_do_not_add_up() -> None:
    assert plan().needed == round(38 * GB * (1 + MARGIN))
    assert plan(optimizer=40 * GB).needed == round(48 * GB * (1 + MARGIN))
    assert plan().missing == plan().needed - 20 * GB
    assert plan(available=plan().needed).missing == 0, "what just fits is not refused"


def test_the_refusal_says_what_is_needed_what_is_there_and_what_to_do() -> None:
    text = plan().refusal(recomputes=False, in_backward=False)
    assert text == (
        "rank 1: got 20.00 GB free on its GPU, expected 39.90 GB for a micro-batch of train.max_micro_batch_tokens=65536 "
        "(8.00 GB of weights' gradients, then 30.00 GB of activations or 1.00 GB of the optimizer's temporaries, and 5%); "
        "lower train.max_micro_batch_tokens to 21000, which would fit, set train.gradient_checkpointing=true, set "
        "train.gradients=in_backward optim.max_grad_norm=null, start vLLM with a smaller --gpu-memory-utilization or "
        "--kv-cache-memory-bytes, or end what else uses the GPU"
    )


def test_what_was_not_profiled_is_a_lower_bound() -> None:
    text = plan(activations=0, optimizer=0, available=GB, largest=0).refusal(recomputes=False, in_backward=False)
    assert "expected at least 8.40 GB" in text
    assert "; set train.gradient_checkpointing=true, " in text, "a smaller micro-batch would not help"


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_cure_is_offered_that_is_taken_already(recomputes: bool, in_backward: bool) -> None:
    for text in (
        plan(largest=0).refusal(recomputes=recomputes, in_backward=in_backward),
        out_of_memory(1, 256, 65536, GB, 0, recomputes=recomputes, in_backward=in_backward),
    ):
        assert ("gradient_checkpointing=true" in text) is not recomputes
        assert ("train.gradients=in_backward" in text) is not in_backward
        assert "--kv-cache-memory-bytes" in text
        assert text.startswith("rank 1: got ")


def test_a_trial_that_ran_out_offers_what_shorter_ones_say() -> None:
    cures = [out_of_memory(1, 256, 65536, GB, largest, recomputes=False, in_backward=False) for largest in (0, 1, 200)]
    assert all("lower it below 256, set" in text for text in cures[:2])
    assert "lower it to 200, which would fit, set" in cures[2]
