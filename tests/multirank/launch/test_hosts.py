"""Ranks on several machines, as they are told, each with a runtime folder of its own: replicas, and one server over two."""

from __future__ import annotations

import re

import pytest

from tests.support.memory_servers import Host, equal


def test_replicas_on_two_machines_learn_together(host: Host) -> None:
    """Each rank finds the server of its own machine, though the launcher numbers ranks in another order. One server starts
    again, and is filled from the other one over the network."""
    a, b = host.serve("a", on="i"), host.serve("b", on="j")
    before = a.weights()
    status, output = host.train(2, "server.replicas=2", machines=["j", "i"])
    assert status == 0, output
    assert sorted(re.findall(r"VERSION (\d) of (\w) on (\d)\.", output)) == [("1", "a", "1"), ("1", "b", "0")]
    assert re.search("training server b on host-j: .*training server a on host-i: ", output, re.DOTALL), output
    trained = a.weights()
    assert equal(trained, b.weights())
    assert not equal(trained, before)
    b.stop()
    b = host.serve("b", on="j")
    status, output = host.train(2, "server.replicas=2", "server.instances=[a,b]", machines=["i", "j"], number=2)
    assert status == 0, output
    assert "b on host-j is filled with the weights of a on host-i" in output
    assert (a.version(), b.version()) == (2, 2)
    assert equal(a.weights(), b.weights())


def test_a_server_over_two_machines_learns_as_on_one(host: Host) -> None:
    """Each rank maps what its machine holds; where it lies in the checkpoint, the other one's manifest says too. The record
    of the weights is kept on both: the next trainer goes on, also where one record is a step behind."""
    one, two = host.serve("one", 2), host.serve("two", 2, on="ij")
    status, output = host.train(2, "server.instance=one")
    assert status == 0, output
    status, output = host.train(2, machines=["i", "j"], save="first")
    assert status == 0, output
    assert "training server two on host-i, host-j: " in output
    assert equal(one.weights(), two.weights())
    behind = two.folders[1] / "weights.json"
    content = behind.read_bytes()
    status, output = host.train(2, machines=["j", "i"], number=2, seen=[("two", 1), ("two", 0)])
    assert "expected tensor-parallel rank 0" in output  # the coordinator runs beside the launcher's rank 0
    status, output = host.train(2, machines=["i", "j"], number=2)
    assert status == 0, output
    behind.write_bytes(content)
    status, output = host.train(2, machines=["i", "j"], number=3)
    assert status == 0, output
    assert two.version() == 3


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
            r"NoServerError: waited 5 s for servers on host host-j in \S+: 0 of 1 shards on host host-j have loaded",
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
