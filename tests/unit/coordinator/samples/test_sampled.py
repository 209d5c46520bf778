"""Sampled completions of POST /train: their tokens, advantages of groups, and what each loss needs or refuses."""

from __future__ import annotations

import msgspec
import pytest

from apollo_tp.coordinator.jobs.job import spec_of
from apollo_tp.coordinator.samples.intake import Intake, Limits
from apollo_tp.coordinator.samples.sampled import NEEDS
from apollo_tp.coordinator.samples.schema import SampleBody, TrainBody, Truncate, decode
from apollo_tp.errors import RequestError
from apollo_tp.wire.commands import Sample
from apollo_tp.wire.losses import DEFAULTS, Loss
from tests.support.chat_model import write_model
from tests.support.served_model import renderer_of

ONE = {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "sampling_logprobs": [-0.5, -1.5]}
FULL = ONE | {"advantage": 1.0, "reference_logprobs": [-0.4, -1.0], "teacher_logprobs": [-0.3, -2.0]}
USED = {
    "cross_entropy": ("prompt_ids", "completion_ids"),
    "kto": ("prompt_ids", "completion_ids", "reference_logprobs", "advantage"),
    "distill": ("prompt_ids", "completion_ids", "sampling_logprobs", "teacher_logprobs"),
}  # fmt: skip


def read(body: dict, renderer: object = "no tokenizer", truncate: Truncate = Truncate.refuse) -> list[Sample]:
    parsed = decode(msgspec.json.encode(body), TrainBody)
    intake = Intake(renderer, Limits(400, 16), truncate)  # type: ignore[arg-type]
    return list(intake.train_samples(parsed, parsed.samples))


def refused(body: dict) -> RequestError:
    with pytest.raises(RequestError) as error:
        read(body)
    return error.value


def test_the_completion_is_learned_with_what_is_known_of_its_tokens() -> None:
    body = FULL | {
        "loss": "ppo",
        "weights": [1.0, 0.5],
        "weight": 2.0,
        "temperature": 0.7,
        "weight_version": 12,
        "reward": 3.0,
    }
    (sample,) = read(body)
    assert (sample.token_ids, sample.weights) == ([1, 2, 3, 4, 5], [0.0, 0.0, 0.0, 2.0, 1.0])
    known = sample.sampled
    assert (known.sampling_logprobs, known.reference_logprobs) == ([-0.5, -1.5], [-0.4, -1.0])
    assert (known.teacher_logprobs, known.advantages) == ([-0.3, -2.0], [1.0, 1.0])
    assert (known.temperature, known.weight_version, known.reward) == (0.7, 12, 3.0)
    (each,) = read(FULL | {"loss": "ppo", "advantage": [0.5, -1.0]})
    assert each.sampled.advantages == [0.5, -1.0]


def test_messages_end_with_the_generation_prompt(tmp_path) -> None:
    renderer = renderer_of(write_model(tmp_path))
    sampled = {key: value for key, value in FULL.items() if key != "prompt_ids"}
    messages = [{"role": "user", "content": "a"}]
    parsed = decode(msgspec.json.encode(sampled | {"messages": messages, "loss": "ppo"}), TrainBody)
    (sample,) = Intake(renderer, Limits(400, 64), Truncate.refuse).train_samples(parsed, None)
    prompt = renderer.encode("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert sample.token_ids == [*prompt, 4, 5]
    assert sample.weights == [0.0] * len(prompt) + [1.0, 1.0]


def test_rewards_are_compared_within_their_group() -> None:
    """TRL's: the standard deviation of a sample, and 1e-4 added to it. Groups may be mixed in a request."""
    rewards = [("a", 1.0), ("b", 5.0), ("a", 0.0), ("a", 0.0), ("b", 5.0)]
    samples = [ONE | {"group": group, "reward": reward} for group, reward in rewards]
    got = [sample.sampled.advantages[0] for sample in read({"samples": samples, "loss": "gspo"})]
    std = ((4 / 9 + 2 / 9) / 2) ** 0.5
    assert got == pytest.approx([2 / 3 / (std + 1e-4), 0.0, -1 / 3 / (std + 1e-4), -1 / 3 / (std + 1e-4), 0.0])
    plain = read({"samples": samples, "loss": "gspo", "loss_config": {"group_std": False}})
    assert [sample.sampled.advantages[0] for sample in plain] == pytest.approx([2 / 3, 0.0, -1 / 3, -1 / 3, 0.0])
    assert refused({"samples": samples[:2], "loss": "ppo"}).field == "samples[0].group"
    alone = refused(ONE | {"reward": 1.0, "loss": "ppo"})
    assert (alone.field, alone.got) == ("group", "a reward without a group")
    (binary,) = read(FULL | {"advantage": None, "reward": 1.0, "loss": "kto"})
    assert binary.sampled.advantages == [1.0, 1.0]


@pytest.mark.parametrize("loss", NEEDS)
def test_a_loss_needs_its_fields(loss: str) -> None:
    """Every one of them, and cross-entropy takes none of the others."""
    names = USED.get(loss, ("prompt_ids", "completion_ids", "sampling_logprobs", "advantage"))
    body = {name: FULL[name] for name in names} | {"loss": loss}
    assert len(read(body)) == 1
    for name in NEEDS[loss]:
        assert refused({key: value for key, value in body.items() if key != name}).field == name
    if loss == "cross_entropy":
        for name in ("sampling_logprobs", "advantage", "reference_logprobs", "teacher_logprobs"):
            assert refused(body | {name: FULL[name]}).field == name
        assert refused(body | {"temperature": 0.5}).field == "temperature"
    else:
        assert refused({"text": "x", "loss": loss}).field == "completion_ids"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling_logprobs": [-0.5]}, "sampling_logprobs"),
        ({"advantage": [1.0]}, "advantage"),
        ({"weights": [1.0, 1.0, 1.0]}, "weights"),
        ({"weights": [0.0, 0.0]}, "completion_ids"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 50}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"sampling_logprobs": [-0.5, 0.5]}, "sampling_logprobs[1]"),
        ({"completion_ids": [4, 400]}, "completion_ids[1]"),
        ({"prompt_ids": [400]}, "prompt_ids[0]"),
        ({"prompt_ids": list(range(15))}, "completion_ids"),
        ({"messages": [{"role": "user", "content": "x"}]}, "sample"),
        ({"text": "x"}, "sample"),
        ({"group": "a"}, "group"),
        ({"loss_config": {"kl_coef": 0.1}, "reference_logprobs": None}, "reference_logprobs"),
        ({"loss_config": {"is_cap": 2.0}}, "loss_config.is_cap"),
        ({"loss_config": {"normalisation": "constant"}}, "loss_config.divisor"),
        ({"loss_config": {"divisor": 3.0}}, "loss_config.divisor"),
        ({"loss_config": {"mask_low": 2.0, "mask_high": 1.5}}, "loss_config.mask_low"),
        ({"loss_config": {"clip": 2.0}}, "loss_config.clip"),
        ({"loss": "grpo"}, "loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(change: dict, field: str) -> None:
    assert refused(FULL | {"loss": "ppo"} | change).field == field


def test_a_sampled_completion_is_not_truncated() -> None:
    body = decode(msgspec.json.encode(FULL | {"prompt_ids": list(range(15)), "loss": "ppo"}), TrainBody)
    with pytest.raises(RequestError, match="17 tokens with the prompt"):
        list(Intake("no tokenizer", Limits(400, 16), Truncate.left).train_samples(body, None))


def test_top_p_and_top_k_that_are_off_are_accepted() -> None:
    (sample,) = read(FULL | {"loss": "ppo", "top_p": 1.0, "top_k": -1, "min_p": 0})
    assert len(sample.token_ids) == 5


def test_a_job_keeps_the_loss_with_all_its_options() -> None:
    body = decode(b'{"text": "x", "loss": "ppo", "loss_config": {"clip_high": 0.28}}', TrainBody)
    loss = spec_of(body).loss
    assert (loss.config.clip_low, loss.config.clip_high, loss.config.normalisation) == (0.2, 0.28, "token_mean")
    assert msgspec.json.decode(msgspec.json.encode(loss), type=Loss) == loss
    assert spec_of(TrainBody(text="x")).loss == Loss() == Loss("cross_entropy", DEFAULTS["cross_entropy"])
    assert set(DEFAULTS) == set(NEEDS)


def test_scoring_takes_any_sampled_sample() -> None:
    intake = Intake("no tokenizer", Limits(400, 16), Truncate.refuse)
    body = decode(msgspec.json.encode(ONE | {"temperature": 0.5, "reward": 1.0, "group": "alone"}), SampleBody)
    (sample,) = intake.samples([body])
    assert sample.sampled.temperature == 0.5
