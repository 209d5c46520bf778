"""Ranks on several machines, as they are told, each with a runtime folder of its own: replicas, and one server over two."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from apollo_tp.config import Config, OptimConfig, QosConfig, ServerConfig
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError
from apollo_tp.launch import hosts
from apollo_tp.launch.hosts import check_shared, meet
from tests.support.memory_servers import Host, equal
from tests.support.ranks import run_ranks


def test_replicas_on_two_machines_learn_together(host: Host) -> None:
    """Each rank finds the server of its own machine, though the launcher numbers ranks in another order. One machine is cut
    off, while the other one may train without it; its server has lived on with the weights of before, and is filled over
    the network when it returns."""
    a, b = host.serve("a", on="i"), host.serve("b", on="j")
    before = a.weights()
    status, output = host.train(2, "server.replicas=2", machines=["j", "i"])
    assert status == 0, output
    assert sorted(re.findall(r"VERSION (\d) of (\w) on (\d)\.", output)) == [("1", "a", "1"), ("1", "b", "0")]
    assert re.search("training server b on host-j: .*training server a on host-i: ", output, re.DOTALL), output
    trained = a.weights()
    assert equal(trained, b.weights())
    assert not equal(trained, before)
    options = ("server.replicas=2", "server.min_replicas=1")
    status, output = host.train(1, *options, machines=["i"], number=2)
    assert status == 0, output
    assert (a.version(), b.version()) == (2, 1)
    status, output = host.train(2, *options, "server.instances=[a,b]", machines=["i", "j"], number=3)
    assert status == 0, output
    assert "b on host-j is filled with the weights of a on host-i" in output
    assert (a.version(), b.version()) == (3, 3)
    assert equal(a.weights(), b.weights())


def test_a_server_over_two_machines_learns_as_on_one(host: Host) -> None:
    """Each rank maps what its machine holds; where it lies in the checkpoint, the other one's manifest says too. The record
    of the weights is kept on both: the next trainer goes on, also where one record is a step behind."""
    one, two = host.serve("one", 2), host.serve("two", 2, on="ij")
    status, output = host.train(2, "server.instance=one")
    assert status == 0, output
    assert output.count("PEERS True.") == 2
    status, output = host.train(2, machines=["i", "j"], save="first")
    assert status == 0, output
    assert "training server two on host-i, host-j: " in output
    assert output.count("PEERS False.") == 2, "memory of another host cannot be read"
    assert equal(one.weights(), two.weights())
    behind = two.folders[1] / "weights.json"
    content = behind.read_bytes()
    status, output = host.train(2, machines=["i", "j"], number=2)
    assert status == 0, output
    behind.write_bytes(content)
    status, output = host.train(2, machines=["i", "j"], number=3)
    assert status == 0, output
    assert two.version() == 3


def test_two_servers_over_two_machines(host: Host) -> None:
    """The second replica's ranks get the manifests of their own server, of its other rank too."""
    a, b = host.serve("a", 2, on="ij"), host.serve("b", 2, on="ij")
    status, output = host.train(4, "server.replicas=2", machines=["i", "i", "j", "j"])
    assert status == 0, output
    assert sorted(re.findall(r"VERSION 1 of (\w) on (\d)\.", output)) == [
        ("a", "0"),
        ("a", "1"),
        ("b", "2"),
        ("b", "3"),
    ]
    assert equal(a.weights(), b.weights())


@pytest.mark.parametrize(
    ("servers", "machines", "overrides", "message"),
    [
        (
            [("a", 1, "i"), ("b", 1, "j")], "ij", ("server.replicas=1",),
            r"ConfigError: server\.replicas: got 1, expected 2, since ranks stand beside servers \['a', 'b'\]",
        ),
        (
            [("a", 1, "i"), ("a", 1, "j")], "ij", ("server.replicas=2",),
            r"ConfigError: server a: got its tensor-parallel rank 0 on host host-i and on host host-j, expected it once",
        ),
        (
            [("a", 1, "i"), ("b", 1, "i")], "ij", ("server.replicas=2",),
            r"ConfigError: trainer ranks on host host-i: got 1, expected one for each served shard there, of a \(1 of",
        ),
        (
            [("a", 1, "i")], "ij", ("server.replicas=2",),
            r"NoServerError: waited 2 s for servers on host host-j in \S+: 0 of 1 shards on host host-j have loaded",
        ),
        (
            [("a", 2, "ij")], None, ("server.runtime_dir='{base}/rt-i'",),
            r"ManifestError: server a: got ranks \[0\] of 2 on this host, expected all, but it runs on 2 \(--nnodes 2\)",
        ),
    ],
    ids=["replicas", "one name", "too many", "none", "one host of two"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(host: Host, servers, machines, overrides, message: str) -> None:
    """Each message names the host."""
    for name, tp_size, on in servers:
        host.serve(name, tp_size, on=on)
    overrides = [override.format(base=host.base) for override in overrides]
    status, output = host.train(2, *overrides, machines=machines)
    assert status != 0
    assert re.search(f"RAISED {message}", output), output


def _meet(tp: TPGroup, configs: list[Config]) -> str:
    try:
        found = meet(Control(tp.rank, tp.size), configs[tp.rank])
    except ConfigError as error:
        return str(error)
    return f"several: {found.several}, beside: {found.num_ranks_beside(tp.rank)}"


def test_hosts_must_have_the_same_options() -> None:
    """Each owner of a tensor updates it by its own; what concerns one host alone may differ."""
    plain = Config()
    own = replace(plain, qos=QosConfig(pace=0.5), server=ServerConfig(runtime_dir="/elsewhere"))
    assert run_ranks(_meet, 2, [plain, own]) == ["several: False, beside: 2"] * 2
    other = run_ranks(_meet, 2, [plain, replace(plain, optim=OptimConfig(lr=1e-3))])
    assert other[0] == other[1]
    assert re.match(r"optim\.lr: got 0\.001 on rank 1 on \S+, expected 1e-05 as on rank 0 on", other[0])


def _share(tp: TPGroup, folders: list[Path]) -> str:
    hosts.SHARED_SECONDS = 0.3
    try:
        check_shared(Control(tp.rank, tp.size), folders[tp.rank])
    except Exception as error:  # noqa: BLE001 - the other rank's is another class
        return f"{type(error).__name__}: {error}"
    return ""


def test_checkpoints_need_a_folder_that_all_hosts_share(tmp_path: Path) -> None:
    """Each rank writes its part there; a part on another disk would be missing when the state is loaded."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    assert run_ranks(_share, 2, [shared, shared]) == ["", ""]
    for folder in (own, tmp_path / "none"):
        own.mkdir(exist_ok=True)
        first, second = run_ranks(_share, 2, [shared, folder])
        assert "RankFailedError: rank 1 failed: ConfigError: checkpoint.dir" in first
        assert f"ConfigError: checkpoint.dir: got {folder}, of which host" in second
    assert list(shared.iterdir()) == []
