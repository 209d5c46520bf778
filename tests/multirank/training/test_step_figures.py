"""A step's figures: what the trainer reports is right, and reaches the coordinator's events, metrics and writers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client.samples import Sample as Measured
from transformers import AutoModelForCausalLM

from apollo_tp.coordinator.http.metrics import Metrics
from apollo_tp.coordinator.http.server_metrics import LatencyHistory
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.jobs.writers import Writer
from apollo_tp.coordinator.settings import Settings
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.inspect.exactness import samples
from apollo_tp.training import rank_loop
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.wire import codec, commands
from tests.support.families import CASES
from tests.support.figures import step_figures
from tests.support.rank_services import RecordingServices
from tests.support.ranks import run_ranks
from tests.support.trainers import CASE, make_trainer, preference_pairs

PAUSED_SECONDS = 0.75


def _replies(tp: TPGroup, checkpoint: Path) -> list[tuple[bytes, bytes]]:
    """Per command: the figures that this rank's trainer returned, and the reply of its loop."""
    trainer, _ = make_trainer(tp, checkpoint)
    trainer.peak_memory_bytes = lambda: 1000 + tp.rank  # type: ignore[method-assign]
    services = RecordingServices(finish_command=lambda weight_version: PAUSED_SECONDS)
    loop = RankLoop(trainer, services, Control(tp.rank, tp.size), None)
    returned: list[commands.StepFigures] = []
    for name in ("step", "preference_step"):
        method = getattr(trainer, name)

        def call(*arguments: Any, method: Any = method) -> commands.StepFigures:
            # of random samples the model predicts none, and 0 could be the value of a figure that was lost
            returned.append(msgspec.structs.replace(method(*arguments), token_accuracy=0.25))
            return returned[-1]

        setattr(trainer, name, call)
    replies = [
        loop.execute(commands.Step(id="j/1", job_id="j", job_step=1, samples=samples())),
        loop.execute(commands.PreferenceStep(id="j/2", job_id="j", job_step=2, pairs=preference_pairs(), beta=0.3)),
    ]
    assert [figures for _, figures in services.steps] == [reply.figures for reply in replies]  # type: ignore[union-attr]
    return [(msgspec.msgpack.encode(f), codec.encode(r)) for f, r in zip(returned, replies, strict=True)]


@pytest.mark.parametrize(
    ("ended_at", "num_replicas", "lags"),
    [([5.0, 7.0], 1, []), ([5.0, 5.5], 2, [0.0, 0.5]), ([9.0, 8.0, 8.5, 8.25, 7.0, 9.5], 3, [0.5, 0.0, 1.0])],
)
def test_the_lag_of_a_replica_is_that_of_its_last_rank(
    ended_at: list[float], num_replicas: int, lags: list[float]
) -> None:
    """After the replica that was first."""
    assert rank_loop._lags(ended_at, num_replicas) == lags


def test_the_reply_has_every_figure_of_the_trainer(checkpoints: Path) -> None:
    """And the peak memory of each rank, and the pause, which only the loop knows."""
    for rank, messages in enumerate(run_ranks(_replies, 2, checkpoints / CASES[CASE].checkpoint)):
        for number, (figures, frame) in enumerate(messages, 1):
            expected = msgspec.structs.replace(
                msgspec.msgpack.decode(figures, type=commands.StepFigures),
                paused_seconds=PAUSED_SECONDS, peak_memory_bytes=[1000, 1001],
            )  # fmt: skip
            reply = codec.decode(frame, commands.AnyReply)
            assert (reply.id, reply.figures) == (f"j/{number}", expected), rank
            assert 0 < expected.num_loss_tokens < expected.num_tokens
            assert set(expected.metrics) == (set() if number == 1 else {"reward_margin", "reward_accuracy"})


def test_token_accuracy_is_a_share_of_the_loss_tokens(checkpoints: Path) -> None:
    """Against the arg max of the single-process model. Tokens of the context do not count."""
    checkpoint = checkpoints / CASES[CASE].checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    batch = []
    with torch.no_grad():  # every second token is what the model predicts, so that some are right
        for sample in samples():
            ids = list(sample.token_ids)
            for i in range(1, len(ids), 2):
                ids[i] = int(model(input_ids=torch.tensor(ids[:i])[None]).logits[0, -1].argmax())
            batch.append(commands.Sample(ids, sample.weights))
    hits = num_loss_tokens = 0
    for sample in batch:
        with torch.no_grad():
            predicted = model(input_ids=torch.tensor(sample.token_ids)[None]).logits[0, :-1].argmax(-1).tolist()
        learned = [weight != 0 for weight in sample.weights[1:]]
        num_loss_tokens += sum(learned)
        hits += sum(p == t and w for p, t, w in zip(predicted, sample.token_ids[1:], learned, strict=True))
    trainer, _ = make_trainer(TPGroup.single(), checkpoint)
    figures = trainer.step(batch)
    assert figures.num_loss_tokens == num_loss_tokens
    assert figures.token_accuracy == pytest.approx(hits / num_loss_tokens)
    assert 0.3 < figures.token_accuracy < 1


def test_a_margin_of_zero_is_no_preference(checkpoints: Path) -> None:
    """As it is in the first step from the reference itself. One of three pairs is preferred here, one rejected."""
    trainer, _ = make_trainer(TPGroup.single(), checkpoints / CASES[CASE].checkpoint)
    scored = trainer.model.sequence_logprobs
    margins = {0: 0.0, 1: 2.0, 2: -3.0}

    def as_the_reference(batch: Any) -> Any:
        result = scored(batch)
        wanted = [_side(margins, index) for index in batch.sample_index]
        exact = result.sequences - result.sequences.detach() + torch.tensor(wanted)
        return dataclasses.replace(result, sequences=exact)

    trainer.model.sequence_logprobs = as_the_reference  # type: ignore[method-assign]
    figures = trainer.preference_step(preference_pairs(), beta=0.5)
    assert figures.metrics["reward_accuracy"] == pytest.approx(1 / 3)
    assert figures.metrics["reward_margin"] == pytest.approx(0.5 * sum(margins.values()) / 3)


def _side(margins: dict[int, float], index: int) -> float:
    """The log-probability of one side: the reference's, plus the pair's margin on the preferred one."""
    pair = preference_pairs()[index // 2]
    return pair.reference_rejected if index % 2 else pair.reference_preferred + margins[index // 2]


DISTINCT = step_figures(
    loss=0.125, token_accuracy=0.25, num_tokens=1001, num_loss_tokens=503, padding_share=0.0625, num_micro_batches=3,
    gradients="in_backward", grad_norm=17.5, learning_rate=3e-4, largest_update=0.0078125, num_updated=41, weight_version=9,
    step_seconds=8.0, forward_seconds=1.0, backward_seconds=2.5, optimizer_seconds=0.5, paused_seconds=0.375,
    peak_memory_bytes=[11, 12, 13], metrics={"reward_margin": 0.75, "reward_accuracy": 0.875},
)  # fmt: skip


def _recorded(folder: Path, figures: commands.StepFigures) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The event's data, the metrics by name and label, and what a writer gets, of one step with these figures."""
    store = Store(folder)
    link = SimpleNamespace(connected=True, weight_version=9, hello=None)
    scheduler = Scheduler(Settings(instance_dir=""), store, link)  # type: ignore[arg-type]
    metrics = Metrics(scheduler, store, LatencyHistory(None, lambda: False))
    written: list[Any] = []
    with Writer("test", written.append, lambda: None) as writer:
        scheduler.on_step.append(writer)
        job = new_job("train", JobSpec(), State.running)
        job.total_steps = 10
        asyncio.run(store.add_job(job, max_queued=5))
        reply = codec.decode(codec.encode(commands.StepDone(id=f"{job.id}/1", figures=figures)), commands.AnyReply)
        scheduler._record_step(job, reply)
    asyncio.run(store.stored())
    (event,) = (event for event in store.events(job.id) if event.type == "metrics")
    measured: list[Measured] = [sample for family in metrics.registry.collect() for sample in family.samples]
    store.close()
    ((_, version, _, values),) = written
    by_name = {"".join((m.name, *m.labels.values())): m.value for m in measured}
    return event.data, by_name, values | {"weight_version": version}


def test_every_figure_reaches_the_event_the_metrics_and_the_writers(tmp_path: Path) -> None:
    data, metrics, written = _recorded(tmp_path, DISTINCT)
    expected = msgspec.to_builtins(DISTINCT)
    del expected["skipped"]  # an empty one is left out
    expected |= expected.pop("metrics")
    assert {name: data.get(name) for name in expected} == expected
    assert (data["train_loss"], data["train_mean_token_accuracy"]) == (0.125, 0.25)
    names = {"step", "total_steps", "tokens_per_second", "seconds_left"}
    assert set(data) - set(expected) == names
    assert metrics.items() >= {
        "apollo_loss_nats": 0.125, "apollo_token_accuracy": 0.25, "apollo_grad_norm": 17.5, "apollo_learning_rate": 3e-4,
        "apollo_padding_share": 0.0625, "apollo_tokens_total": 1001, "apollo_loss_tokens_total": 503,
        "apollo_steps_totalcompleted": 1, "apollo_step_seconds_sum": 8.0, "apollo_step_part_seconds_totalforward": 1.0,
        "apollo_step_part_seconds_totalbackward": 2.5, "apollo_step_part_seconds_totaloptimizer": 0.5,
        "apollo_step_part_seconds_totalother": 4.0, "apollo_peak_memory_bytes2": 13,
        "apollo_step_figurereward_margin": 0.75, "apollo_step_figurereward_accuracy": 0.875,
    }.items()  # fmt: skip
    assert written == {
        "weight_version": 9, "tokens": 1001.0, "learning_rate": 3e-4, "step_seconds": 8.0, "padding_share": 0.0625,
        "loss": 0.125, "grad_norm": 17.5, "token_accuracy": 0.25, "reward_margin": 0.75, "reward_accuracy": 0.875,
    }  # fmt: skip


def test_a_skipped_step_says_why_and_has_no_loss_to_show(tmp_path: Path) -> None:
    skipped = msgspec.structs.replace(DISTINCT, skipped="the loss was not finite", loss=math.nan)
    data, metrics, written = _recorded(tmp_path, skipped)
    assert data["skipped"] == "the loss was not finite"
    assert data["train_loss"] is None
    assert (metrics["apollo_loss_nats"], metrics["apollo_steps_totalskipped"]) == (0, 1)
    assert not {"loss", "grad_norm", "token_accuracy"} & set(written)
