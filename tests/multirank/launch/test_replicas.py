"""Trainer ranks that torchrun starts, beside servers of one host: from manifests to a step, without vLLM.

The servers are this process: it holds their memory and publishes their manifests.
"""

from __future__ import annotations

import re
import threading
import time

import pytest

from apollo_tp.shards.instance import read_instance
from tests.support.memory_servers import Host, equal


def test_two_servers_learn_together_and_a_new_one_is_filled(host: Host) -> None:
    """Two ranks beside two servers: equal bits, not those of before. One server starts again, with the weights on disk: the
    next trainer fills it, and goes on at the next version. Its own records say so too."""
    a, b = host.serve("a"), host.serve("b")
    before = a.weights()
    status, output = host.train(2, "server.replicas=2", save="first")
    assert status == 0, output
    assert sorted(re.findall(r"VERSION (\d) of (\w) on (\d)\.", output)) == [("1", "a", "0"), ("1", "b", "1")]
    trained = a.weights()
    assert equal(trained, b.weights())
    assert not equal(trained, before)
    b.stop()
    b = host.serve("b")
    assert equal(b.weights(), before)
    status, output = host.train(2, "server.replicas=2", "server.instances=[b,a]", number=2)
    assert status == 0, output
    assert re.search(r"b on \S+ is filled with the weights of a on", output), output
    assert "optimizer state of" in output, output
    assert (a.version(), b.version()) == (2, 2)
    assert equal(a.weights(), b.weights())
    assert not equal(a.weights(), trained)


def test_the_history_of_the_weights_outlives_their_first_server(host: Host) -> None:
    """An interrupted job goes on with them, and a coordinator knows them by the life with which they began."""
    a, b = host.serve("a"), host.serve("b")
    status, output = host.train(2, "server.replicas=2", save="first")
    assert status == 0, output
    began = a.record()["life"]
    assert began == b.record()["life"] == read_instance(a.folders[0])[0].life
    a.stop()
    b.change_record(life="a@1.1")  # both servers are this process, which has one life
    a = host.serve("a")
    status, output = host.train(2, "server.replicas=2", number=2)
    assert status == 0, output
    assert a.record()["life"] == b.record()["life"] == "a@1.1"
    assert (a.version(), b.version()) == (2, 2)


def test_ranks_stand_beside_the_shard_that_they_see(host: Host) -> None:
    """Two replicas of two ranks, started in an order that is not the servers'."""
    a, b = host.serve("a", 2), host.serve("b", 2)
    status, output = host.train(4, "server.replicas=2", seen=[("b", 0), ("a", 1), ("a", 0), ("b", 1)])
    assert status == 0, output
    assert sorted(re.findall(r"VERSION 1 of (\w) on (\d)\.", output)) == [
        ("a", "2"),
        ("a", "3"),
        ("b", "0"),
        ("b", "1"),
    ]
    assert equal(a.weights(), b.weights())


@pytest.mark.parametrize(
    ("changes", "ranks", "overrides", "message"),
    [
        (
            {"max_model_len": 7},
            2,
            (),
            r"ManifestError: replicas: b tp rank 0 on \S+: longest request: got 7, expected \d+",
        ),
        ({}, 3, (), r"ConfigError: trainer ranks: got 3, expected 2, one for each shard of a \(TP 1\), b \(TP 1\)"),
        ({}, 2, ("server.instances=[a,c]",), r"NoServerError: waited .* for server c"),
        ({"dtype": "float16"}, 2, (), r"ManifestError: replicas: b tp rank 0 on \S+: dtype: got float16, expected"),
    ],
    ids=["options", "ranks", "names", "dtype"],
)
def test_what_does_not_fit_is_refused(host: Host, changes, ranks: int, overrides, message: str) -> None:
    """Before anything is written; each message names the replica and its host, or the number of ranks."""
    a = host.serve("a")
    host.serve("b", **changes)
    before = a.weights()
    status, output = host.train(ranks, "server.replicas=2", *overrides)
    assert status != 0
    assert re.search(f"RAISED {message}", output), output
    assert equal(a.weights(), before)


def test_other_weights_are_refused(host: Host) -> None:
    """One bit of one tensor that is not among those compared with the folder."""
    host.serve("a")
    b = host.serve("b")
    _, tensors = next(b._mapped())
    name, (_, local) = next((n, t) for n, t in tensors.items() if n.endswith("norm.weight"))
    local.view(-1)[3] += 2.0**-10
    status, output = host.train(2, "server.replicas=2", "server.verify_tensors=0")
    assert status != 0
    assert re.search(
        rf"RAISED ReplicaError: replicas: got other bits than on a on \S+ in {re.escape(name)} on b on", output
    )


def test_training_goes_on_with_the_servers_that_are_up(host: Host) -> None:
    """With fewer than all if it may: a rank without a server waits for one, and ends when it comes, so that the launcher
    starts all again. The returned server is filled."""
    a = host.serve("a")
    options = ("server.replicas=2", "server.min_replicas=1", "server.replica_wait_seconds=0")
    returned: list = []

    def start_b() -> None:
        while not (a.folders[0] / "weights.json").exists() or a.version() < 1:
            time.sleep(0.05)
        returned.append(host.serve("b"))

    thread = threading.Thread(target=start_b, daemon=True)
    thread.start()
    status, output = host.train(2, *options)
    thread.join(10)
    assert status != 0
    assert "training goes on with a alone: 1 of 2 shards" in output
    assert re.findall(r"VERSION (\d) of (\w) on (\d)\.", output) == [("1", "a", "0")], output
    assert "SPARE 1." in output
    assert "RAISED ServerReturnedError: server b is up" in output, output
    status, output = host.train(2, *options, number=2)
    assert status == 0, output
    assert re.search(r"b on \S+ is filled with the weights of a on", output), output
    assert (a.version(), returned[0].version()) == (2, 2)
    assert equal(a.weights(), returned[0].weights())


def test_too_few_servers_are_waited_for(host: Host) -> None:
    host.serve("a")
    status, output = host.train(3, "server.replicas=3", "server.min_replicas=2", "server.replica_wait_seconds=0")
    assert status != 0
    assert "1 of 3 shards on host" in output
    assert "VERSION" not in output
