"""``python -m apollo_tp.inspect MODEL --try``: is a model that nobody has listed exact, refused, or wrong?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import AutoConfig

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.inspect import __main__ as command
from apollo_tp.inspect import copy_trial
from apollo_tp.inspect.copy_trial import EXACT, Trial, build
from apollo_tp.inspect.shrink import HEADS, VOCABULARY, shrink
from tests.support import forks
from tests.support.families import FAMILIES, Family
from tests.support.processes import FORKING_SERVER

# but for large towers, and for types that have no number of experts or KV heads by default
LARGE = {"gemma3", "qwen3_5", "qwen2_5_vl", "qwen3_vl", "mistral3", "glm4v"}
PUBLISHED = sorted({family.model_type for family in FAMILIES.values()} - LARGE - {"dots1", "nemotron"})


@pytest.mark.parametrize("model_type", [*PUBLISHED, "deepseek_v3", "llama4_text", "phimoe"])
def test_a_copy_is_small_and_has_a_layer_of_each_kind(model_type: str) -> None:
    """From the sizes that the type has by default, which are those of a published model."""
    config = AutoConfig.for_model(model_type)
    small = shrink(config)
    assert type(small) is type(config)
    assert sum(parameter.numel() for parameter in build(small).parameters()) < 1_000_000
    kinds = set(getattr(config, "layer_types", None) or ())
    assert set(getattr(small, "layer_types", None) or ()) == kinds
    assert small.num_hidden_layers >= 2
    assert small.num_attention_heads == HEADS
    changed = {name for name, value in config.to_dict().items() if getattr(small, name, None) != value}
    kept = {
        "attention_bias",
        "tie_word_embeddings",
        "hidden_act",
        "rms_norm_eps",
        "logit_scale",
        "logits_scaling",
        "norm_topk_prob",
    }
    assert not changed & kept
    assert getattr(small, "sliding_window", None) in (None, 0, 8)


def test_what_a_config_says_of_its_layers_is_kept() -> None:
    """Ratios of heads, one KV head, lists with an entry for each layer, ids of tokens, lengths of stretched positions."""
    config = AutoConfig.for_model(
        "smollm3", num_hidden_layers=7, num_attention_heads=12, num_key_value_heads=1, no_rope_layers=[1, 1, 0, 1, 1, 0, 1],
        vocab_size=50000, bos_token_id=49999, pad_token_id=None,
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    small = shrink(config)
    assert (small.num_key_value_heads, small.no_rope_layers, small.vocab_size) == (1, [1, 0], VOCABULARY)
    assert (small.bos_token_id, small.pad_token_id) == (1, None)
    assert small.rope_parameters["original_max_position_embeddings"] == 64
    assert small.rope_parameters["factor"] == 8.0


def test_a_config_that_refuses_small_sizes_is_said_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r"(?s)granitemoehybrid: got .* for a copy with small sizes"):
        shrink(AutoConfig.for_model("granitemoehybrid"))


@pytest.mark.slow
def test_a_copy_is_tried_on_ranks_of_its_own(tmp_path) -> None:
    """A family without a row in docs/models.md, over the layout of vLLM's own loader."""
    config = Family("starcoder2", {"sliding_window": 8}).config(architectures=["Starcoder2ForCausalLM"])
    config.save_pretrained(tmp_path)
    done = forks.run(FORKING_SERVER, ["apollo_tp.inspect", "--tp", "2", "--try", str(tmp_path)], 280)
    text = " ".join(done.stdout.split())
    assert "model.layers.*.self_attn.q_proj.weight │ 2 │ trained │ cut on dimension 0" in text
    assert "tried at TP 2 on a small random copy in fp32: exact. The largest error of loss" in text, done.stderr
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_refusal_in_a_process_of_its_own_is_told(tmp_path) -> None:
    """An encoder-decoder model is none that transformers builds for causal language modelling."""
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    (trial,) = copy_trial._run([(copy_trial._write_weights, (str(tmp_path),))])
    assert trial.refusal.startswith("a small copy of clip: got ValueError: Unrecognized configuration class")
    assert not trial.exact


@pytest.mark.parametrize(
    ("trial", "status", "said"),
    [
        (Trial("", EXACT, "a.weight"), 0, "fp32: exact."),
        (
            Trial("", 2 * EXACT, "a.weight"),
            1,
            "NOT EXACT, do not train it. The largest error of loss, gradients (relative)",
        ),
        (Trial("", float("nan"), "a.weight"), 1, "NOT EXACT"),
        (Trial("no head", 0.0, ""), 1, "tried, refused: no head"),
    ],
)
def test_a_copy_that_is_not_exact_is_an_error(monkeypatch, trial: Trial, status: int, said: str) -> None:
    """Also if an error is not a number."""
    monkeypatch.setattr(copy_trial, "try_copy", lambda *_, **__: trial)
    console = Console(width=300, record=True, file=SimpleNamespace(write=lambda _: None, flush=lambda: None))
    assert command._try("model", 2, False, console) == status
    assert said in console.export_text()


@pytest.mark.parametrize(("arguments", "message"), [((8, False), "--tp 8"), ((2, True), "--trust-remote-code")])
def test_what_cannot_be_tried_is_said(arguments, message) -> None:
    size, trust = arguments
    with pytest.raises(UnsupportedModelError, match=message):
        copy_trial.try_copy("model", size, trust_remote_code=trust)
