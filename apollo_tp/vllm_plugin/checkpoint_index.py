"""Names, shapes and dtypes of the checkpoint that a server loaded, read from file headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apollo_tp.manifest import CheckpointTensor


def model_folder(model: str, revision: str | None, download_dir: str | None = None) -> Path | None:
    """The local folder of a model: itself, or its snapshot in the Hugging Face cache; None if there is none."""
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def read_index(folder: Path) -> list[CheckpointTensor]:
    """Tensors of all ``*.safetensors`` in a Hugging Face folder, in name order; empty if it has none."""
    from safetensors import safe_open

    found: dict[str, CheckpointTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                found[name] = CheckpointTensor(
                    name=name, shape=list(part.get_shape()), dtype=part.get_dtype(), file=path.name
                )
    return [found[name] for name in sorted(found)]


def index_from_config(hf_config: Any, dtype: str) -> list[CheckpointTensor]:
    """What a checkpoint of this config would hold, from the model class on meta (for --load-format dummy): transformers'
    own conversion back to checkpoint names, so that experts come one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    hf_config = _transformers_config(hf_config)
    kind = AutoModelForCausalLM if hf_config.get_text_config() is hf_config else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(hf_config)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if hf_config.tie_word_embeddings else set()
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        state = revert_weight_conversion(model, state)
    return [CheckpointTensor(name=name, shape=list(state[name].shape), dtype=dtype) for name in sorted(state)]


def _transformers_config(config: Any) -> Any:
    """``config`` as transformers' own class. vLLM registers classes of its own for some model types (0.26: Qwen3.5), which
    lack fields that transformers' modules read."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    own = getattr(transformers, CONFIG_MAPPING_NAMES.get(config.model_type, ""), None)
    return config if own is None or isinstance(config, own) else own.from_dict(config.to_dict())
