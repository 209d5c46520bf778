"""What the ranks of one host of several find there, and what they wait for."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_tp.errors import ConfigError, ManifestError
from apollo_tp.launch.hosts import _look
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import check_agreement, wait_for_server
from apollo_tp.shards.manifest import Manifest, publish
from apollo_tp.shards.serving import Serving, publish_serving
from tests.support.manifests import manifest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def serve(base: Path, *ranks: Manifest) -> Path:
    folder = instance_folder.instance_dir(ranks[0].instance_id, base)
    for rank in ranks:
        publish(rank, folder)
    return folder


def test_a_host_waits_for_as_many_shards_as_it_has_ranks(base: Path) -> None:
    """And then for the engine, of which only the host with the API server is told."""
    assert _look(base, [], 2, "h") == ({}, "0 of 2 shards on host h have loaded their model; waiting for the others")
    parts = [manifest(rank, 4, num_nodes=2, instance_id="wide", endpoints=rank < 2) for rank in range(4)]
    folder = serve(base, parts[0])
    assert _look(base, [], 2, "h")[1].startswith("1 of 2 shards on host h")
    serve(base, parts[1])
    found, awaited = _look(base, [], 2, "h")
    assert ([m.tp_rank for m in found["wide"]], awaited) == (
        [0, 1], "server wide on host h has loaded its model; waiting for its engine",
    )  # fmt: skip
    publish_serving(Serving(), folder)
    assert _look(base, [], 2, "h")[1] == ""


def test_a_host_without_the_api_server_waits_for_no_engine(base: Path) -> None:
    serve(base, *(manifest(rank, 4, num_nodes=2) for rank in (2, 3)))
    assert _look(base, [], 2, "h")[1] == ""


def test_servers_of_other_hosts_are_left_to_them(base: Path) -> None:
    """A runtime folder may be on a disk that hosts share. Their processes cannot be seen here: their lock can."""
    serve(base, manifest(0, 1, instance_id="far", boot_id="another"))
    serve(base, manifest(0, 1, instance_id="near"))
    found, awaited = _look(base, [], 1, "h")
    assert (list(found), awaited) == (["near"], "")
    with pytest.raises(ManifestError, match="got a server on host h, expected one on this host"):
        check_agreement([manifest(0, 1, boot_id="another")])


def test_only_named_servers_are_taken_where_there_are_more(base: Path) -> None:
    for name in ("a", "b"):
        serve(base, manifest(0, 1, instance_id=name))
    with pytest.raises(
        ConfigError, match=r"on host h: got 1, expected .* of a \(1 of its shards\), b \(1 of its shards\)"
    ):
        _look(base, [], 1, "h")
    assert list(_look(base, ["b", "elsewhere"], 1, "h")[0]) == ["b"]


def test_a_failed_export_is_told_at_once(base: Path) -> None:
    serve(base, manifest(0, 2, error="RuntimeError: no"))
    with pytest.raises(ManifestError, match="rank 0: export failed in the server: RuntimeError: no"):
        _look(base, [], 2, "h")


def test_a_part_of_a_server_is_no_server(base: Path) -> None:
    serve(base, manifest(1, 2, num_nodes=2))
    with pytest.raises(
        ManifestError, match=r"got ranks \[1\] of 2 on this host, .* on 2 \(--nnodes 2\); start a trainer rank"
    ):
        wait_for_server(base, None, 0)
