"""Which model a loader has loaded, and whether an API server starts in front of the engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apollo_tp.vllm_plugin.compat.hooks import has_endpoints, is_draft


def test_a_draft_model_is_not_taken_for_the_served_one() -> None:
    """vLLM loads one of method draft_model with a config that is all about the draft."""
    target, draft = object(), object()

    def config(model: object, **speculative: object) -> SimpleNamespace:
        return SimpleNamespace(
            model_config=model, speculative_config=SimpleNamespace(**speculative) if speculative else None
        )

    assert not is_draft(config(target), target)
    assert not is_draft(config(target, draft_model_config=draft, target_model_config=target), target)
    assert not is_draft(config(target, draft_model_config=target, target_model_config=target), target), "n-gram"
    assert is_draft(config(draft, draft_model_config=draft, target_model_config=target), draft), "draft_model"
    assert is_draft(config(target, draft_model_config=draft, target_model_config=target), draft), "EAGLE, MTP"


@pytest.mark.parametrize(
    ("context", "headless", "argv", "rust", "expected"),
    [
        ("OPENAI_API_SERVER", False, ["vllm", "serve"], "0", True),
        ("LLM_CLASS", False, ["x.py"], "0", False),
        ("OPENAI_API_SERVER", True, ["vllm", "serve"], "0", False),
        ("OPENAI_API_SERVER", False, ["vllm", "serve", "--grpc"], "0", False),
        ("OPENAI_API_SERVER", False, ["vllm", "serve"], "1", False),
        (None, False, ["x.py"], "0", False),
        ("OPENAI_API_SERVER", False, ["/vllm/entrypoints/openai/api_server.py"], "1", True),
        ("OPENAI_API_SERVER", False, ["/vllm/entrypoints/grpc_server.py"], "0", False),
    ],
)
def test_a_server_says_whether_its_api_will_tell_that_it_is_ready(
    context: str | None, headless: bool, argv: list[str], rust: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer waits for that, and must not wait for what never comes."""
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", rust)
    assert has_endpoints(context, headless) is expected
