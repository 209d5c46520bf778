"""What a checkpoint would hold, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import PretrainedConfig

from apollo_tp.vllm_plugin.checkpoint_index import index_from_config, weight_files
from tests.support.families import FAMILIES


class _Vision(PretrainedConfig):
    model_type = "qwen3_5"  # as vLLM 0.26 has it; transformers' vision tower has a type of its own


class _Server(PretrainedConfig):
    model_type = "qwen3_5"
    sub_configs: ClassVar = {"vision_config": _Vision}


def test_a_config_class_of_the_server_gives_the_checkpoint_that_transformers_gives() -> None:
    """vLLM 0.26 has its own Qwen3.5 configs: its vision config lacks what transformers' vision tower reads."""
    own = FAMILIES["qwen3.5-vision"].config()
    vision = {k: v for k, v in own.vision_config.to_dict().items() if k not in ("rope_parameters", "model_type")}
    server = _Server(text_config=own.text_config, vision_config=_Vision(**vision), tie_word_embeddings=False)
    assert index_from_config(server, "BF16") == index_from_config(own, "BF16")


def test_the_files_that_vllm_loads_are_read(tmp_path: Path) -> None:
    """Beside Hugging Face's files there may be Mistral's own, whose rows are in another order."""
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "old.safetensors"):
        (tmp_path / name).touch()
    for load_format in ("auto", "mistral"):
        with pytest.raises(RuntimeError, match=r"consolidated\.safetensors.*--load-format safetensors"):
            weight_files(tmp_path, load_format)
    names = [path.name for path in weight_files(tmp_path, "safetensors")]
    assert names == ["model-1.safetensors", "model-2.safetensors", "old.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path, "safetensors")] == names[:2]
