"""Models whose folder brings Python code: it is run only if the option says so, and nobody is asked on standard input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apollo_tp.errors import ConfigError, UnsupportedModelError
from apollo_tp.model.build import build_on_meta, read_model_config
from tests.support import forks
from tests.support.processes import FORKING_SERVER

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    path = tmp_path / "own_model"
    path.mkdir()
    (path / "own_code.py").write_text(CODE)
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    content = {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": names} | sizes
    (path / "config.json").write_text(json.dumps(content))
    return path


def test_code_in_a_folder_is_refused_by_default_and_the_option_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code: got false and .*own_model.*expected true"):
        read_model_config(str(folder), trust_remote_code=False)


def test_a_trusted_models_own_classes_are_used(folder: Path) -> None:
    """For the config and for the model."""
    config = read_model_config(str(folder), trust_remote_code=True)
    assert type(config).__name__ == "OwnConfig"
    assert type(build_on_meta(config, 1, torch.float32, trust_remote_code=True)).__name__ == "OwnModel"


def test_a_folder_that_no_class_is_known_for_is_refused_as_such(folder: Path) -> None:
    """The option would not help."""
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(UnsupportedModelError, match="no_such_type"):
        read_model_config(str(folder), trust_remote_code=False)


@pytest.mark.vllm
@pytest.mark.parametrize("trusted", [False, True])
def test_inspect_runs_such_code_only_if_told_to(folder: Path, trusted: bool) -> None:
    command = ["apollo_tp.inspect", str(folder), "--tp", "1"]
    done = forks.run(FORKING_SERVER, [*command, *(["--trust-remote-code"] if trusted else [])], 200)
    assert ("--trust-remote-code: got no such option" in done.stderr) == (not trusted), done.stderr
