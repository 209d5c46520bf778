"""What the API server says of how it serves reaches the coordinator: that the engine is up, its tokenizer, its template."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apollo_tp.config import Config, HttpConfig, ServiceConfig
from apollo_tp.coordinator import settings
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import ENDPOINTS_VARIABLE
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.serving import ChatTemplate, Serving, publish_serving
from apollo_tp.vllm_plugin import export
from tests.support.chat_model import INST, write_model
from tests.support.manifests import manifest


def _header(model: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "test")
    config = SimpleNamespace(
        model=str(model), revision=None, tokenizer=str(tokenizer), tokenizer_revision=None, served_model_name="m",
        dtype="torch.bfloat16", max_model_len=8, hf_config=None,
    )  # fmt: skip
    server = SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"), load_config=SimpleNamespace(download_dir=None), model_config=config
    )
    return export._header(server, config, 0, 1)


def test_the_header_names_the_tokenizer_and_who_will_say_that_the_engine_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that is the model's own is not named; one that is not here is, so that no other is taken for it."""
    monkeypatch.delenv(ENDPOINTS_VARIABLE, raising=False)
    header = _header(tmp_path, tmp_path, monkeypatch)
    assert (header["tokenizer_path"], header["endpoints"]) == ("", False)
    monkeypatch.setenv(ENDPOINTS_VARIABLE, "1")
    (other := tmp_path / "other").mkdir()
    header = _header(tmp_path, other, monkeypatch)
    assert (header["tokenizer_path"], header["endpoints"]) == (str(other), True)
    assert Manifest(**header).tokenizer_path == str(other)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _header(tmp_path, Path("nobody/nothing"), monkeypatch)["tokenizer_path"] == "nobody/nothing"


def test_the_coordinator_is_told(tmp_path: Path) -> None:
    """As the server renders, so does what is trained on."""
    tmp_path.chmod(0o700)
    model, tokenizer = write_model(tmp_path / "model"), write_model(tmp_path / "tokenizer")
    (model / "tokenizer.json").unlink()
    serving = Serving(chat=ChatTemplate(text=INST, parts=True), chat_template_kwargs={"brief": 1})
    publish_serving(serving, tmp_path)
    config = Config(service=ServiceConfig(http=HttpConfig(port=0), state_dir=str(tmp_path / "state")))
    served = manifest(model_path=str(model), tokenizer_path=str(tokenizer))
    CoordinatorProcess(config, tmp_path, served).stop()
    told = settings.load(tmp_path / "coordinator_settings.json")
    assert (told.model_path, told.tokenizer_folder, told.serving) == (str(model), tokenizer, serving)
