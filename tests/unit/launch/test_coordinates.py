"""Which rank stands beside which shard, the same on all ranks; refusals that name replica and host."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from apollo_tp.config import Config, GradientMode, OptimConfig, ServerConfig, TrainConfig
from apollo_tp.errors import ConfigError, ManifestError, NoServerError
from apollo_tp.launch.coordinates import Coordinate, Offer, ServedRank, arrange, assign, facts_of
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import wait_for_servers
from apollo_tp.shards.manifest import SegmentRecord, publish
from tests.support.manifests import manifest

A0, A1, B0, B1 = (ServedRank(name, rank) for name in "ab" for rank in (0, 1))
ALL = [A0, A1, B0, B1]


def offers(*wanted: list[ServedRank]) -> list[Offer]:
    return [Offer("h", "boot pid:[1]", shards) for shards in wanted]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([ALL] * 4, ALL),
        ([[A0], [B1], [B0], [A1]], [A0, B1, B0, A1]),
        ([[A0, B0], [A0, A1], [B1], [A0, A1, B0]], [A0, A1, B1, B0]),
        ([ALL, [A0], [A1], [B1]], [B0, A0, A1, B1]),
        ([[A1, B0], [A0], [A1], [B1]], [B0, A0, A1, B1]),
    ],
    ids=["a CPU: in order", "one GPU each", "some", "rank 0 gives way", "rank 0 leads a replica"],
)
def test_each_rank_has_a_shard_of_its_own(wanted: list[list[ServedRank]], expected: list[ServedRank]) -> None:
    assert assign(offers(*wanted)) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([[A0], [A0]], "trainer rank 1 on h: got a tp rank 0, which other ranks need"),
        ([[A0], []], "trainer rank 1 on h: got no shard"),
        ([[A1], [A0]], "trainer rank 0 on h: got a tp rank 1, expected tensor-parallel rank 0"),
    ],
)
def test_a_rank_without_one_is_named(wanted: list[list[ServedRank]], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        assign(offers(*wanted))


def test_ranks_of_several_machines_have_the_shards_of_their_own() -> None:
    """The number of a rank says nothing about its machine."""
    i, j = "boot pid:[1]", "boot pid:[2]"
    wanted = [Offer("i", i, [A0, A1]), Offer("j", j, [B0, B1]), Offer("i", i, [A0, A1]), Offer("j", j, [B0, B1])]
    assert assign(wanted) == [A0, B0, A1, B1]
    with pytest.raises(ConfigError, match="trainer rank 3 on i: got a tp rank 0, a tp rank 1, which other ranks need"):
        assign([wanted[0], wanted[1], wanted[0], wanted[0]])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([ALL[:2]] * 4, [A0, A1, None, None]),
        ([[A0], [], [A1], []], [A0, None, A1, None]),
        ([[A1, B0], [A1], [], [B1]], [B0, A1, None, B1]),
        ([ALL] * 4, ALL),
    ],
)
def test_ranks_without_a_server_are_spare(wanted: list[list[ServedRank]], expected: list[ServedRank | None]) -> None:
    """Where that is allowed, all shards of the servers that are up have a rank, and rank 0 leads one."""
    assert assign(offers(*wanted), spare=True) == expected
    if None in expected:
        with pytest.raises(ConfigError, match="expected a shard of its own"):
            assign(offers(*wanted))


@pytest.mark.parametrize("wanted", [[[], [A0], [A1]], [[A1], [A0], []]])
def test_rank_0_is_never_spare(wanted: list[list[ServedRank]]) -> None:
    """The coordinator is beside it."""
    with pytest.raises(ConfigError, match=r"trainer rank 0 on h: got .*expected"):
        assign(offers(*wanted), spare=True)


def test_spare_ranks_have_the_highest_numbers() -> None:
    """The others are numbered as if these were not there."""
    b0, a1, a0, b1 = coordinates(B0, A1, A0, B1)
    mesh = arrange([b0, None, a1, a0, None, b1])
    assert (mesh.instances, mesh.ranks) == (["b", "a"], [[0, 5], [3, 2]])
    assert [mesh.position(rank, 6) for rank in range(6)] == [0, 4, 3, 2, 5, 1]
    assert not arrange([*coordinates(A0, size=1), None]).is_permuted
    assert arrange([coordinates(A0)[0], None, coordinates(A1)[0]]).is_permuted


def test_two_servers_of_one_name_are_refused() -> None:
    """On two hosts, where each could take the name; nobody knows which is meant."""
    with pytest.raises(ConfigError, match=r"server a: got its tensor-parallel rank 0 on host i and on host j"):
        assign([Offer("i", "boot pid:[1]", [A0]), Offer("j", "boot pid:[2]", [A0])])


def coordinates(*shards: ServedRank, size: int = 2, **facts: str) -> list[Coordinate]:
    """Of ranks beside these shards; ``facts`` are those of the last one."""
    plain = {"model": "/m", "dtype": "bfloat16"}
    found = [Coordinate(f"host-{s.instance}", "boot pid:[1]", s, size, plain) for s in shards]
    return [*found[:-1], msgspec.structs.replace(found[-1], facts=plain | facts)]


def test_the_mesh_has_the_servers_order() -> None:
    """Replica 0 is that of rank 0, the others follow by name; tensor-parallel ranks are the server's."""
    mesh = arrange(coordinates(B0, A1, A0, B1))
    assert (mesh.instances, mesh.hosts, mesh.ranks) == (["b", "a"], ["host-b", "host-a"], [[0, 3], [2, 1]])
    assert [mesh.position(rank, 4) for rank in range(4)] == [0, 3, 2, 1]
    assert mesh.is_permuted
    assert not arrange(coordinates(*ALL)).is_permuted
    assert mesh.spread == [False, False]


def test_a_server_may_be_spread_over_hosts() -> None:
    """Its ranks have layouts of their own, and everything else in common."""
    a0, a1 = coordinates(A0, A1, layout="b")
    a1 = msgspec.structs.replace(a1, host="i", machine="boot pid:[2]")
    a0 = msgspec.structs.replace(a0, facts={"layout": "a", **a0.facts})
    mesh = arrange([a0, a1])
    assert (mesh.hosts, mesh.spread) == (["host-a, i"], [True])
    with pytest.raises(ManifestError, match=r"no trainer rank beside tp ranks \[1\] .* needs one \$APOLLO_TP_INSTANCE"):
        arrange([a0, msgspec.structs.replace(a1, shard=B1)])
    other = msgspec.structs.replace(a1, facts=a1.facts | {"model": "/n"})
    with pytest.raises(
        ManifestError, match=r"a tp rank 1 on i: model: got /n, expected /m as of a tp rank 0 on host-a"
    ):
        arrange([a0, other])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (coordinates(A0, A1, B0), "b on host-b: got no trainer rank beside tp ranks [1] of 2"),
        (coordinates(A0, A0, A1), "a tp rank 0 on host-a: got trainer ranks 0 and 1 beside it, expected one"),
        (
            coordinates(A0, A1, B0, B1, dtype="float32"),
            "b tp rank 1 on host-b: dtype: got float32, expected bfloat16 as of a tp rank 1 on host-a",
        ),
        (
            [*coordinates(A0, A1), *coordinates(B0, size=1)],
            "b on host-b: got tensor-parallel size 1, expected 2 as of a on host-a",
        ),
    ],
    ids=["hole", "duplicate", "fact", "size"],
)
def test_what_is_no_mesh_is_refused(found: list[Coordinate], message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        arrange(found)


def test_facts_tell_what_differs(tmp_path: Path) -> None:
    """Of two servers of one folder nothing; of others the model, its config, an option, the layout."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    own = facts_of(manifest(model_path=str(tmp_path)))
    assert facts_of(manifest(model_path=str(tmp_path / "."), instance_id="other", pid=1)) == own
    segment = SegmentRecord(checkpoint="w", box_offset=[0], box_shape=[4], served="w", view_offset=0, view_stride=[1])
    changes = {
        "model": {"model_path": "/other"},
        "config overrides": {"config_overrides": {"rope_theta": 2.0}},
        "longest request": {"max_model_len": 7},
        "layout": {"segments": [segment]},
        "vLLM release": {"vllm_version": "0.1"},
    }
    for fact, change in changes.items():
        others = facts_of(manifest(**{"model_path": str(tmp_path)} | change))
        assert {name for name in own if others[name] != own[name]} == {fact} | (
            {"config"} if fact == "model" else set()
        )


def test_servers_are_awaited_by_number_or_by_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for name in ("a", "b"):
        publish(manifest(0, 1, instance_id=name), instance_folder.instance_dir(name, tmp_path))
    assert list(wait_for_servers(tmp_path, [], 2, 0.0)) == ["a", "b"]
    assert list(wait_for_servers(tmp_path, ["b"], 1, 0.0)) == ["b"]
    with pytest.raises(NoServerError, match=r"got 2 live ones .*expected 3 as server\.replicas says"):
        wait_for_servers(tmp_path, [], 3, 0.0)
    with pytest.raises(ManifestError, match=r"got 2 live servers .*, expected 1 .*server\.instances=\[\.\.\.\]"):
        wait_for_servers(tmp_path, [], 1, 0.0)


def test_options_that_contradict_each_other_are_refused() -> None:
    for changes, name in (
        ({"replicas": 0}, "server.replicas"),
        ({"replicas": 2, "instances": ["a"]}, "server.instances"),
        ({"replicas": 2, "instances": ["a", "a"]}, "server.instances"),
        ({"replicas": 2, "instance": "a"}, "server.instance"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: got "):
            ServerConfig(**changes)  # type: ignore[arg-type]
    train, optim = TrainConfig(gradients=GradientMode.in_backward), OptimConfig(max_grad_norm=None)
    with pytest.raises(ConfigError, match=r"train\.gradients: got 'in_backward', expected stored or auto"):
        replace(Config(), train=train, optim=optim, server=ServerConfig(replicas=2))
