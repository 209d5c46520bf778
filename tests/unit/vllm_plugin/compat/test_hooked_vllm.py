"""What the plugin does to real vLLM on a CPU: its hooks, its engine client, and how it renders conversations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import forks, rendered_chats
from tests.support.processes import FORKING_SERVER


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/support/hooked_vllm.py found."""
    done = forks.run(FORKING_SERVER, ["tests.support.hooked_vllm", str(tmp_path_factory.mktemp("hooked"))], 240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_experts_on_a_cpu_are_served_plain_or_as_vllm_serves_them(hooked: dict[str, Any]) -> None:
    """bf16, in another order of summation; gpt-oss's have biases, and alternating rows. Those with an activation that is not
    known stay vLLM's."""
    for name in ("qwen3-moe", "gpt-oss"):
        difference, as_loaded, refusals = hooked["experts"][name]
        assert (difference < 0.01, as_loaded, refusals) == (True, True, []), name
    difference, as_loaded, (refusal,) = hooked["experts"]["unknown"]
    assert (difference, as_loaded) == (0.0, False)
    assert "got activation swigluoai, expected silu, gelu or gelu_tanh, since" in refusal


def test_what_vllm_makes_of_a_weight_follows_it_into_shared_memory(hooked: dict[str, Any]) -> None:
    """The absorbed matrices of DeepSeek-V3's latent attention, which are not served by themselves."""
    assert hooked["latent attention"] == {"same": [True, True], "served": [], "refusals": []}
    assert hooked["backend with AMX"] == "CPU_MLA"


def test_convolutions_on_a_cpu_take_the_weight_as_loaded(hooked: dict[str, Any]) -> None:
    """vLLM tells its kernels that the weight is packed. They are told otherwise, and compute the same bits."""
    found = hooked["convolutions"]
    assert found["given"] == [[64, 4, False]] * 2
    if found["same"] is None:
        pytest.skip("vLLM packs these weights on CPUs with AVX512_BF16 alone")
    assert found["same"] == [True, True, True]


def test_all_requests_are_salted(hooked: dict[str, Any]) -> None:
    """Raw prompts, which vLLM prepares in a thread, rendered ones and ready requests; a salt of their own is left alone."""
    salts = ["first", "second", "None"]
    three = ["/".join([salt] * 3) for salt in salts]
    assert hooked["salts"] == {
        "raw": salts, "rendered": salts, "ready": salts, "three answers": three, "own salt": ["own"] * 3
    }  # fmt: skip


def test_models_of_other_loaders_are_followed_and_refused(hooked: dict[str, Any]) -> None:
    """tensorizer's, for one, does not call the method of all loaders; one that does is as good as vLLM's."""
    own = "--load-format mine: it does not load weights in vLLM's usual way; serve with --load-format auto"
    assert hooked["loaders"] == {"tensorizer": ["True"], "Usual": [""], "Own": [own], "Calls": [""]}


def test_a_connector_that_cannot_be_emptied_is_not_taken_for_emptied(hooked: dict[str, Any]) -> None:
    """vLLM asks it, and takes silence for yes."""
    assert hooked["connectors"] == {
        "OffloadingConnector": True, "ExampleConnector": False, "all of several": True, "one of several": False
    }  # fmt: skip


@pytest.mark.parametrize("server", rendered_chats.SERVERS)
def test_conversations_become_the_text_that_is_served(hooked: dict[str, Any], server: str) -> None:
    """Whatever template vLLM chose, in whatever form it takes contents, tools, reasoning and the developer's role."""
    for name, (by_vllm, by_us) in hooked["chats"][server].items():
        if server == "none":
            assert by_vllm.startswith("ChatTemplateResolutionError"), name
            assert "the served model has no chat template" in by_us, name
        else:
            assert by_us == by_vllm, name
            assert "<|im_start|>" in by_vllm, name


def test_the_default_of_a_chat_is_seen_and_its_own_wins(hooked: dict[str, Any]) -> None:
    """Had a template seen neither, the comparison above would say nothing of them."""
    chats = hooked["chats"]["defaults"]
    assert [chats[name][1][:5] for name in ("plain", "own", "automatic")] == ["null3", "nullé", "null3"]


def test_servers_that_render_otherwise_say_so(hooked: dict[str, Any]) -> None:
    """No template, no conversation; and the server goes on, whatever its tokenizer does."""
    expected = {
        "no tokenizer": "--skip-tokenizer-init",
        "gpt-oss": "by Harmony",
        "a renderer of its own": "by Other, not by a template",
        "a tokenizer's own": "by OwnTokenizer.apply_chat_template",
        "a tokenizer that fails": "vLLM could not say how it renders them (StopIteration:",
        "reserved": "--default-chat-template-kwargs sets tools, which are vLLM's own",
    }
    found = hooked["chat refusals"]
    assert all(text in found[name] for name, text in expected.items()), found
