"""Names, shapes and dtypes of the checkpoint that a server loaded, read from file headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apollo_tp.shards.manifest import CheckpointTensor


def model_folder(model: str, revision: str | None, download_dir: str | None = None) -> Path | None:
    """The local folder of a model: the folder ``model``, or its snapshot in the Hugging Face cache. None if there is
    none."""
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def weight_files(folder: Path, load_format: str) -> list[Path]:
    """The ``*.safetensors`` files of a Hugging Face folder that vLLM loads; if there is an index, those that it names.

    Raises RuntimeError if vLLM would load Mistral's own files, whose rows are in another order.
    """
    files, own = sorted(folder.glob("*.safetensors")), set(folder.glob("consolidated*.safetensors"))
    if own and load_format in ("auto", "mistral"):
        raise RuntimeError(
            f"{folder}: got Mistral's own format ({min(own).name}), expected Hugging Face's, often in the same folder; "
            "serve with --load-format safetensors --config-format hf --tokenizer-mode hf"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        return [path for path in files if path.name in named]
    return [path for path in files if path not in own]


def read_index(folder: Path, load_format: str = "auto") -> list[CheckpointTensor]:
    """The tensors (global shapes) that vLLM loads from a Hugging Face folder, in the order of their names. Reads headers
    only; empty if the folder has no ``*.safetensors``."""
    from safetensors import safe_open

    found: dict[str, CheckpointTensor] = {}
    for path in weight_files(folder, load_format):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                found[name] = CheckpointTensor(
                    name=name, shape=list(part.get_shape()), dtype=part.get_dtype(), file=path.name
                )
    return [found[name] for name in sorted(found)]


def index_from_config(hf_config: Any, dtype: str, *, trust_remote_code: bool = False) -> list[CheckpointTensor]:
    """The tensors (global shapes) that a checkpoint of this config would contain, for ``--load-format dummy``.

    The model class is built on the meta device; transformers itself converts names back to those of a checkpoint, where
    each expert has tensors of its own.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    hf_config = _transformers_config(hf_config)
    kind = AutoModelForCausalLM if hf_config.get_text_config() is hf_config else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(hf_config, trust_remote_code=trust_remote_code)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if hf_config.tie_word_embeddings else set()
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        state = revert_weight_conversion(model, state)
    return [CheckpointTensor(name=name, shape=list(state[name].shape), dtype=dtype) for name in sorted(state)]


def _transformers_config(config: Any) -> Any:
    """``config`` as an instance of transformers' class for its model type."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # vLLM release 0.26: registers a class of its own for some types (Qwen3.5) without fields that transformers' modules
    # read.
    own = getattr(transformers, CONFIG_MAPPING_NAMES.get(config.model_type, ""), None)
    return config if own is None or isinstance(config, own) else own.from_dict(config.to_dict())
