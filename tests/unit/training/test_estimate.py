"""What `apollo-tp plan` says, before anything is started, of what real trainers measured and planned on GPUs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import MixtralConfig, Qwen3Config

from apollo_tp.cli.plan import RECOMPUTE_SPEED, Gpus, parse_gpus, rows, utilization
from apollo_tp.config import Precision
from apollo_tp.errors import ConfigError, UnsupportedModelError
from apollo_tp.training.estimate import TRAINER_CONTEXT, Estimate, Options, read_config

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SHAPES = RESULTS.parent / "model_shapes.json"
GB = 10**9


def _results(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())["results"]


@pytest.fixture(scope="module")
def qwen() -> Qwen3Config:
    """The 8.19B shape that was measured."""
    return Qwen3Config(**json.loads(SHAPES.read_text())["Qwen3-8B"])


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_and_state_are_those_that_were_measured(qwen: Qwen3Config, tp: int) -> None:
    """To the byte."""
    measured = _results("2026-11-26_scale_qwen3-8b.json")[tp - 1]
    held, estimate = measured["memory_bytes"], Estimate(qwen, tp)
    assert estimate.num_parameters == measured["num_parameters"]
    assert estimate.weights == held["served weights"]
    state = sum(held[f"optimizer: {part}"] for part in ("projected moments", "AdamW moments", "remainders"))
    assert estimate.state(Precision.remainder) == state
    assert held["trainer on the device, with its context"] - held["trainer's peak beyond the weights"] == pytest.approx(
        TRAINER_CONTEXT, abs=0.9e9
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_plan_is_what_the_trainers_planner_said(qwen: Qwen3Config, tp: int) -> None:
    said = _results("2026-11-26_scale_qwen3-8b.json")[tp - 1]["memory_plan"]
    needed, gradients, activations, free = (
        float(re.search(pattern, said)[1])
        for pattern in (r"^([\d.]+) GB", r"\(([\d.]+) GB", r"then ([\d.]+) GB", r"([\d.]+) GB free")
    )
    plan = Estimate(qwen, tp).plan(Options(), round(free * GB))
    assert plan.gradients / GB == pytest.approx(gradients, abs=0.01)
    assert plan.activations / GB == pytest.approx(activations, rel=0.03)
    assert plan.needed / GB == pytest.approx(needed, rel=0.03)
    assert plan.largest == 4096


@pytest.mark.parametrize(("case", "recompute"), [("4x", False), ("4x-recompute", True)])
def test_peaks_of_steps_with_several_micro_batches(qwen: Qwen3Config, case: str, recompute: bool) -> None:
    """The last micro-batch's activations beside all gradients, with the allocator's fragmentation."""
    measured = next(r for r in _results("2026-11-25_step_4x_recompute.json") if r["case"] == case)
    estimate, options = Estimate(qwen, 2), Options(recompute=recompute)
    peak = estimate.state(options.precision) + estimate.weights + estimate.plan(options, 0).activations
    assert peak / GB == pytest.approx(measured["beyond_weights_gb"][0], rel=0.03)


def test_the_speeds_that_were_measured(qwen: Qwen3Config) -> None:
    measured = {r["tp"]: r["tokens_per_second"] for r in _results("2026-11-26_scale_qwen3-8b.json")}
    for tp, speed in measured.items():
        found = rows(Estimate(qwen, tp), Gpus(tp, "H200", 141), tokens=4096, kv_tokens=65_536)
        assert found[0].tokens_per_second == pytest.approx(speed, rel=0.02)
    cases = {r["case"]: r["tokens_per_second"] for r in _results("2026-11-25_step_4x_recompute.json")}
    assert pytest.approx(cases["4x-recompute"] / cases["4x"], rel=1e-3) == RECOMPUTE_SPEED
    assert rows(Estimate(qwen, 1), Gpus(1, "L40S", 48), tokens=4096, kv_tokens=1)[0].tokens_per_second is None


def test_options_that_take_less_make_it_fit(qwen: Qwen3Config) -> None:
    """On one GPU of 80 GB stored gradients and all activations fit; on one of 48 GB only less than that."""
    estimate = Estimate(qwen, 1)
    assert rows(estimate, Gpus(1, "H100", 80), tokens=4096, kv_tokens=16_384)[0].fits
    small = rows(estimate, Gpus(1, "L40S", 48), tokens=4096, kv_tokens=16_384)
    assert not small[0].fits
    best = next(row for row in small if row.fits)
    assert "train.gradients=in_backward" in best.options
    assert best.parts["gradients"] == 0
    assert sum(best.parts.values()) == best.total <= best.device
    served = best.parts["weights"] + best.parts["KV cache"] + best.parts["vLLM's own"]
    assert served <= utilization(best) * best.device < served + best.device / 100


def test_fewer_tokens_are_offered_and_fit(qwen: Qwen3Config) -> None:
    estimate = Estimate(qwen, 2)
    free = 15 * GB
    largest = estimate.plan(Options(), free).largest
    assert 0 < largest < 4096
    assert (
        estimate.plan(Options(tokens=largest), free).missing
        <= 0
        < estimate.plan(Options(tokens=largest + 1), free).missing
    )


def test_the_kv_cache_of_a_rank(qwen: Qwen3Config) -> None:
    """Keys and values of eight heads of 128 in 36 layers; at TP = 16 each rank still holds one head."""
    assert Estimate(qwen, 1).kv_cache(1) == 2 * 36 * 8 * 128 * 2
    assert Estimate(qwen, 16).kv_cache(1) == 2 * 36 * 128 * 2
    assert Estimate(qwen, 2).state(Precision.stochastic) < Estimate(qwen, 2).state(Precision.remainder) / 5


def test_what_cannot_be_planned_is_refused(qwen: Qwen3Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 3, expected a divisor of the model's 32 heads"):
        Estimate(qwen, 3)
    with pytest.raises(UnsupportedModelError, match="routed experts"):
        Estimate(MixtralConfig(num_hidden_layers=1), 2)
    with pytest.raises(ConfigError, match=r"MODEL: got .*nothing.*expected a folder with a config\.json"):
        read_config(str(tmp_path / "nothing"))
    for text in ("H200", "2xH200", "0xH200-141", "2xH200-141GB", "2 x H200-141"):
        with pytest.raises(ConfigError, match="--gpus: got"):
            parse_gpus(text)
    assert parse_gpus("8xA100-80") == Gpus(8, "A100", 80)
