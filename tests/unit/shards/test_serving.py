"""What the API server says of how it serves reaches the coordinator: that the engine is up, its tokenizer, its template."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apollo_tp.config import Config, HttpConfig, ServiceConfig
from apollo_tp.coordinator import settings
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import ENDPOINTS_VARIABLE
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.serving import ChatTemplate, Serving, read_serving
from apollo_tp.vllm_plugin import chat
from apollo_tp.vllm_plugin.manifest_builder import manifest_header
from tests.support.chat_model import INST, write_model
from tests.support.manifests import manifest
from tests.support.served_model import publish_folder


def _header(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "test")
    config = SimpleNamespace(
        model=str(model), revision=None, served_model_name="m",
        dtype="torch.bfloat16", max_model_len=8, hf_config=None,
    )  # fmt: skip
    server = SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"), load_config=SimpleNamespace(download_dir=None), model_config=config
    )
    return manifest_header(server, 0, 1)


def test_the_header_says_who_will_tell_that_the_engine_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API server, if there is one."""
    monkeypatch.delenv(ENDPOINTS_VARIABLE, raising=False)
    assert Manifest(**_header(tmp_path, monkeypatch)).endpoints is False
    monkeypatch.setenv(ENDPOINTS_VARIABLE, "1")
    assert Manifest(**_header(tmp_path, monkeypatch)).endpoints is True


def test_the_coordinator_is_told(tmp_path: Path) -> None:
    """As the server tokenises and renders, so does what is trained on; nothing of the model's folder is asked."""
    tmp_path.chmod(0o700)
    model, tokenizer = write_model(tmp_path / "model"), write_model(tmp_path / "tokenizer")
    (model / "tokenizer.json").unlink()
    served = publish_folder(
        tokenizer, tmp_path, chat=ChatTemplate(text=INST, parts=True), chat_template_kwargs={"brief": 1}
    )
    config = Config(service=ServiceConfig(http=HttpConfig(port=0), state_dir=str(tmp_path / "state")))
    process = CoordinatorProcess(config, tmp_path)
    process.begin(tmp_path, manifest(model_path=str(model)))
    process.stop()
    told = settings.load(tmp_path / "coordinator_settings.json")
    assert (told.model_path, told.serving) == (str(model), served)
    assert Renderer(told.serving, tmp_path).text("Hello", append_eos=False)[0]


def test_a_server_that_said_nothing_takes_token_ids(tmp_path: Path) -> None:
    """Nobody guesses its tokenizer from the model's folder."""
    tmp_path.chmod(0o700)
    config = Config(service=ServiceConfig(http=HttpConfig(port=0), state_dir=str(tmp_path / "state")))
    process = CoordinatorProcess(config, tmp_path)
    process.begin(tmp_path, manifest(model_path=str(write_model(tmp_path / "model"))))
    process.stop()
    assert settings.load(tmp_path / "coordinator_settings.json").serving == Serving()


def test_a_server_that_cannot_be_asked_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it is up, and why texts cannot be trained on."""
    chat.publish_of_client(object(), SimpleNamespace(), tmp_path)
    served = read_serving(tmp_path)
    assert served is not None
    assert "could not say which tokenizer it uses (AttributeError" in served.text_refusal
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    chat.publish_of_engine(object(), tmp_path)
    served = read_serving(tmp_path)
    assert served is not None
    assert "front end in Rust" in served.text_refusal
