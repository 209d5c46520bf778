"""What the API server says of how it serves reaches the coordinator: that the engine is up, its tokenizer, its template."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apollo_tp import runtime
from apollo_tp.config import Config, HttpConfig, ServiceConfig
from apollo_tp.coordinator import settings
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.manifest import ENDPOINTS_VARIABLE, Manifest, read_serving
from apollo_tp.vllm_plugin import export
from tests.unit.chat_model import CHATML, INST, write_model
from tests.unit.test_manifest import manifest


def _header(model: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(runtime.INSTANCE_VARIABLE, "test")
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


@pytest.mark.parametrize("given", ["file", "text", "builtin", None])
def test_the_template_is_published_as_vllm_takes_it(tmp_path: Path, given: str | None) -> None:
    """A file's text, one of vLLM's own files, or the option itself; without one, only that the engine is up."""
    (tmp_path / "t.jinja").write_text(CHATML + "é\n", encoding="utf-8")
    option = {"file": str(tmp_path / "t.jinja"), "text": INST, "builtin": "template_chatml.jinja", None: None}[given]
    export.on_serving(SimpleNamespace(chat_template=option), tmp_path)
    serving = read_serving(tmp_path)
    assert serving is not None
    if given == "builtin":
        assert "<|im_start|>" in str(serving.chat_template)
    else:
        assert serving.chat_template == {"file": CHATML + "é\n", "text": INST, None: None}[given]


def test_the_coordinator_is_told(tmp_path: Path) -> None:
    """As the server renders, so does what is trained on."""
    tmp_path.chmod(0o700)
    model, tokenizer = write_model(tmp_path / "model"), write_model(tmp_path / "tokenizer")
    (model / "tokenizer.json").unlink()
    export.on_serving(SimpleNamespace(chat_template=INST), tmp_path)
    config = Config(service=ServiceConfig(http=HttpConfig(port=0), state_dir=str(tmp_path / "state")))
    served = manifest(model_path=str(model), tokenizer_path=str(tokenizer))
    CoordinatorProcess(config, tmp_path, served).stop()
    told = settings.load(tmp_path / "coordinator_settings.json")
    assert (told.model_path, told.tokenizer_folder, told.chat_template) == (str(model), tokenizer, INST)
