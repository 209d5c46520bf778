"""What deploy/ has: well-formed, and every command and option in it exists. Nothing of it is run."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from apollo_tp.cli import serve
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.runtime import instance_folder

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*")


def _containers(node):
    """All containers in a manifest."""
    if isinstance(node, dict):
        yield from node.get("containers", [])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _containers(child)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_name_what_there_is(path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "mine")
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= document.keys() for document in documents)
    (container,) = [each for document in documents for each in _containers(document)]
    claims = {document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"}
    assert not claims or f"claimName: {claims.pop()}" in path.read_text()
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if container["command"] == ["apollo-tp", "serve"]:
        model, *options = container["args"][: container["args"].index("--")]
        overrides = container["args"][len(options) + 2 :]
        plan = serve.plan(model, options, overrides)
        assert plan.trainer[plan.trainer.index("--nproc-per-node") + 1] == str(gpus)
    else:
        (script,) = container["args"]
        assert f"TP={gpus}" in script
        assert all((ROOT / name).is_file() for name in re.findall(r"launch/\w+\.sh", script))
        words = shlex.split(script.replace("\\\n", " "), comments=True)
        start = words.index("launch/torchrun.sh") + 1
        overrides = [word.replace("$NNODES", "2") for word in words[start:] if OVERRIDE.fullmatch(word)]
    assert len(overrides) > 3
    read_arguments(overrides)  # raises for an option that there is not


def _check(words: list[str]) -> int:
    """How many trainer ranks ``apollo-tp serve`` would start with these arguments. Raises for unknown options."""
    split = words.index("--")
    plan = serve.plan(words[0], words[1:split], words[split + 1 :])
    read_arguments(words[split + 1 :])
    return int(plan.trainer[plan.trainer.index("--nproc-per-node") + 1])


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "mine")


def test_the_compose_file_asks_for_what_its_command_needs(plain):
    (service,) = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"].values()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert _check(service["command"]) == device["count"]
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_unit_starts_a_command_that_there_is(plain):
    text = (ROOT / "deploy/systemd/apollo-tp.service").read_text().replace("\\\n", " ")
    (start,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, command, *words = shlex.split(start.replace("%S", "/var/lib").replace("${MODEL}", "MODEL"))
    assert (Path(program).name, command) == ("apollo-tp", "serve")
    assert _check(words) == 2


def test_the_image_has_what_is_installed():
    """Every file that is copied exists, and so do those that the build needs."""
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "apollo_tp", "conf", "launch"} <= copied
