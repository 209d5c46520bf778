"""Replicas that are trained together against one process: R x P of 2 x 1, 4 x 1, 2 x 2 and 1 x 4."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError, ConfigError, ReplicaError
from apollo_tp.optim import Optimizer
from apollo_tp.optim.owners import Owners, assign_owners
from apollo_tp.optim.parameters import leaf_of_complete_gradient
from tests.support import optim_model as model
from tests.support.collective_faults import LEAVES, Collectives
from tests.support.optim_model import loss_of
from tests.support.ranks import run_ranks

STEPS = 8
SHAPES = [(2, 1), (4, 1), (2, 2), (1, 4)]
VARIANTS = {
    "apollo": {},
    "no_limiter_no_clip": {"norm_growth_limit": None, "max_grad_norm": None},
    "clipped": {"max_grad_norm": 0.05},
    "mini_clipped": {"kind": "apollo_mini", "max_grad_norm": 0.05},
    "adamw": {"kind": "adamw"},
}


def variant(name: str) -> OptimConfig:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(model.config()), VARIANTS[name])
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def share(whole: dict[str, torch.Tensor], replica: int, size: int) -> dict[str, torch.Tensor]:
    """A part of the full gradients: those of all replicas sum up to ``whole``, and none is like another."""
    parts = torch.arange(1, size + 1) / sum(range(1, size + 1))
    noise = torch.Generator().manual_seed(5)
    result = {}
    for name, value in whole.items():
        noises = torch.randn(size, *value.shape, generator=noise) * value.abs().mean()
        result[name] = value * parts[replica] + noises[replica] - noises.mean(0)
    return result


def train(world: TPGroup, tp_size: int, name: str, precision: Precision = Precision.remainder) -> dict:
    mesh = Mesh.build(world, tp_size)
    params = model.parameters(mesh.tp)
    optimizer = Optimizer(variant(name), precision, params, mesh.tp, mesh.replicas)
    norms, updates = [], []
    for step in range(STEPS):
        model.set_gradients(params, share(model.gradients(step), mesh.replicas.rank, mesh.replicas.size))
        outcome = optimizer.step()
        assert (outcome.skipped, outcome.num_updated) == ("", len(params))
        norms.append(outcome.grad_norm)
        updates.append(outcome.largest_update)
        optimizer.zero_grad()
    if optimizer.owners is not None:
        optimizer.owners.check_equal()
    return {
        "values": model.local_values(params),
        "norms": norms,
        "updates": updates,
        "traffic": dict(mesh.replicas.traffic),
        "state": optimizer.state_bytes(),
    }


def train_all(world: TPGroup, tp_size: int) -> dict[str, dict]:
    return {name: train(world, tp_size, name) for name in VARIANTS}


@lru_cache
def trained(num_replicas: int, tp_size: int) -> list[dict[str, dict]]:
    return run_ranks(train_all, num_replicas * tp_size, tp_size, deadline_seconds=240)


@lru_cache
def twin(name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    return model.train_twin(variant(name), STEPS)


@pytest.mark.parametrize(("num_replicas", "tp_size"), SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_replicas_equal_one_process(num_replicas, tp_size, name):
    """Weights, norms and sizes of updates are those of one process with the summed gradients; replicas have equal bits."""
    results = [rank[name] for rank in trained(num_replicas, tp_size)]
    weights, norms = twin(name)
    first = results[:tp_size]
    for rank, result in enumerate(results):
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
        assert result["updates"] == results[0]["updates"]
        for key, value in result["values"].items():
            np.testing.assert_array_equal(value, first[rank % tp_size]["values"][key], err_msg=f"{key}, rank {rank}")
    for key, value in model.assemble([r["values"] for r in first]).items():
        torch.testing.assert_close(value, weights[key], rtol=2e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("num_replicas", "tp_size"), [(2, 1), (4, 1), (2, 2)])
def test_bytes_and_state(num_replicas, tp_size):
    """Per step a reduce-scatter of the gradients and a broadcast of the weights, but for padding; state is divided."""
    results = [rank["apollo"] for rank in trained(num_replicas, tp_size)]
    alone = [rank["apollo"] for rank in trained(1, 4)] if tp_size == 4 else run_ranks(train_all, tp_size, tp_size)
    for rank, result in enumerate(results):
        size = sum(v.nbytes for v in result["values"].values())
        for kind in ("all_gather", "reduce_scatter"):  # with a few numbers for the decision and for canaries
            assert STEPS * size <= result["traffic"][kind] < 1.2 * STEPS * size + STEPS * 48 * num_replicas
        assert rank < len(results)
    for shard in range(tp_size):
        own = [results[shard + r * tp_size]["state"] for r in range(num_replicas)]
        whole = alone[shard]["apollo"]["state"] if tp_size < 4 else alone[shard]["state"]
        assert sum(own) == whole
        assert max(own) < 1.3 * whole / num_replicas


def skip(world: TPGroup, bad: int, where: str) -> list:
    """One replica has a gradient, or a loss, that is not finite; then a good step."""
    mesh = Mesh.build(world, 1)
    params = model.parameters(mesh.tp, torch.bfloat16)
    results = []
    for clip in (1.0, None):
        optimizer = Optimizer(model.config(max_grad_norm=clip), Precision.remainder, params, mesh.tp, mesh.replicas)
        before = [p.tensor.detach().clone() for p in params]
        moved = optimizer.update_group.counters.limiter_norms.clone()
        gradients, loss = share(model.gradients(0), mesh.replicas.rank, world.size), torch.tensor(1.0)
        if mesh.replicas.rank == bad and where == "loss":
            loss = torch.tensor(math.nan)
        elif mesh.replicas.rank == bad:
            gradients[where][0] = math.inf
        model.set_gradients(params, gradients)
        outcome = optimizer.step(loss=loss)
        same = all(torch.equal(a, p.tensor) for a, p in zip(before, params, strict=True))
        same = same and torch.equal(moved, optimizer.update_group.counters.limiter_norms)
        model.set_gradients(params, share(model.gradients(1), mesh.replicas.rank, world.size))
        results.append((outcome.skipped, outcome.num_updated, same, optimizer.step().skipped))
    return results


@pytest.mark.parametrize("where", ["loss", "case_a.weight", "norm.weight"])
@pytest.mark.parametrize("bad", [0, 1])
def test_all_replicas_skip_or_none(bad, where):
    """What is not finite on one replica stops the step on all, leaves no trace, and is named on all alike."""
    results = run_ranks(skip, 2, bad, where)
    assert results[0] == results[1]
    for skipped, num_updated, same, then in results[0]:
        assert "not finite" in skipped
        assert where in skipped
        assert (num_updated, same, then) == (0, True, "")


def lack(world: TPGroup, clip: float | None, everywhere: bool) -> tuple[list[str], list[str]]:
    """(what is wrong, collectives) of a second step, in which each collective before the write in turn never happens, on all
    replicas or on the last one alone."""
    collectives, mesh = Collectives(world), Mesh.build(world, 1)
    params = model.parameters(mesh.tp, torch.bfloat16)
    config = model.config(max_grad_norm=clip, check_replicas_every=0)
    optimizer = Optimizer(config, Precision.remainder, params, mesh.tp, mesh.replicas)

    def step() -> str:
        whole = share(model.gradients(0), mesh.replicas.rank, mesh.replicas.size)
        model.set_gradients(params, whole)
        return optimizer.step(loss=torch.tensor(1.0)).skipped

    first = collectives.count
    assert step() == ""
    calls = collectives.log[first : -2 * len(optimizer.owners.buckets)]  # two of each bucket copy the owners' weights
    before, kept, progress = model.snapshot(optimizer), model.local_values(params), optimizer.progress()
    found = []
    for at, call in enumerate(calls[: None if everywhere else -1]):  # the last one decides on each replica by itself
        for leave in LEAVES:
            try:
                with collectives.fault(at, leave, here=everywhere or world.rank == world.size - 1):
                    step()
                found.append(f"{call} leaves {leave}: no error")
            except CollectiveError:
                pass
            same = all((kept[name] == value).all() for name, value in model.local_values(params).items())
            if not same or not model.same(before, model.snapshot(optimizer)) or optimizer.progress() != progress:
                found.append(f"{call} leaves {leave}: something moved")
    assert step() == ""
    optimizer.owners.check_equal()
    return found, calls


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_nothing_is_written_from_a_sum_over_replicas_that_never_happened(clip, everywhere):
    """On no replica, whichever lacks it: neither weights nor moments, norms and counts; the next step is sound."""
    for rank, (wrong, calls) in enumerate(run_ranks(lack, 2, clip, everywhere)):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"
        assert [call.split()[0] for call in calls] == ["reduce_scatter_tensor"] + ["all_reduce"] * (
            clip is not None
        ) + ["all_gather_into_tensor"]


def interrupt(world: TPGroup) -> list[str]:
    """What is wrong after each of the collectives in turn by which weights are copied was aborted, on one replica or all."""
    collectives, mesh, found = Collectives(world), Mesh.build(world, 1), []
    params = model.parameters(mesh.tp, torch.bfloat16)
    optimizer = Optimizer(model.config(), Precision.remainder, params, mesh.tp, mesh.replicas)
    owners, fresh = optimizer.owners, model.local_values(params)
    for copy in (owners.publish, lambda: owners.fill(0)):
        first = collectives.count
        copy()
        calls = collectives.log[first:]
        for at, call in enumerate(calls):
            for leave in LEAVES:
                for everywhere in (True, False):
                    for p in params:  # others than those that are copied
                        p.tensor.data.copy_(torch.from_numpy(fresh[p.name]) + world.rank)
                    before = model.local_values(params)
                    with collectives.fault(at, leave, everywhere or world.rank == world.size - 1, aborts=True):
                        copy()
                    for p, owner in zip(params, owners.owner, strict=True):
                        source = owner if copy == owners.publish else 0
                        sent = (torch.from_numpy(fresh[p.name]) + source).bfloat16().float().numpy()
                        now = model.local_values([p])[p.name]
                        if not (now == before[p.name]).all() and not (now == sent).all():
                            found.append(f"{call} number {at} leaves {leave}: {p.name} is neither old nor new")
        copy()
        owners.check_equal()
    return found


def test_weights_are_old_or_new_where_their_copy_was_aborted():
    """Served memory never holds what an aborted collective left."""
    for rank, wrong in enumerate(run_ranks(interrupt, 3, deadline_seconds=200)):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"


def beside(world: TPGroup, tp_size: int) -> list[str]:
    """What is wrong with sums that run beside the backward pass: against those behind it, bit for bit, in small buckets."""
    collectives, mesh, found = Collectives(world), Mesh.build(world, tp_size), []
    params = model.parameters(mesh.tp)
    owner = assign_owners(params, mesh.replicas.size)
    owners = Owners(params, owner, mesh.replicas, bucket_bytes=5_000)
    own = [i for i, replica in enumerate(owner) if replica == mesh.replicas.rank]
    parts = [share(model.gradients(step), mesh.replicas.rank, mesh.replicas.size) for step in range(2)]
    late = sum(
        any(leaf_of_complete_gradient(params[i]) is None for part in bucket.indices for i in part)
        for bucket in owners.buckets
    )
    orders = {
        "all": params,
        "replicas in different orders": params[::-1] if mesh.replicas.rank else params,
        "one without gradient": [p for p in params if p.name != "case_c.weight"],
        "one without gradient on a replica": [p for p in params if p.name != "case_d.weight" or mesh.replicas.rank],
    }

    def summed(order: list, begun: bool) -> tuple[dict[int, torch.Tensor], int]:
        """The sums of what this replica owns, and how many were launched before all gradients were there."""
        for p in params:
            p.tensor.grad = None
        loss_of(params, parts[0]).backward()  # of an earlier micro-batch
        first = collectives.count
        if begun:
            owners.begin()
        loss_of(order, parts[1]).backward()
        launched = collectives.count - first
        without, arrived = owners.sum_gradients()
        assert arrived.item() == 1
        return {i: without[i] if i in without else params[i].grad.clone() for i in own}, launched

    for name, order in orders.items():
        expected, none = summed(order, begun=False)
        got, launched = summed(order, begun=True)
        if not all(torch.equal(got[i], value) for i, value in expected.items()):
            found.append(f"{name}: other sums than behind the backward pass")
        if none or (name == "all" and launched != len(owners.buckets) - late):
            found.append(f"{name}: {none} and {launched} of {len(owners.buckets)} buckets, {late} of them late")
    owners.begin()
    loss_of(params, parts[0]).backward()
    owners.abandon()  # a step that failed elsewhere: the next one sums anew
    expected, _ = summed(params, begun=False)
    got, _ = summed(params, begun=True)
    if not all(torch.equal(value, got[i]) for i, value in expected.items()):
        found.append("other sums after a step that did not end")
    return found


@pytest.mark.parametrize(("num_replicas", "tp_size"), [(2, 1), (3, 1), (2, 2)])
def test_sums_beside_the_backward_pass_are_those_behind_it(num_replicas, tp_size):
    for wrong in run_ranks(beside, num_replicas * tp_size, tp_size):
        assert not wrong


def repair(world: TPGroup) -> tuple[list[str], dict]:
    """A trainer was killed: one replica's ranks differ in what both hold, and another tensor is not that of its owner."""
    mesh = Mesh.build(world, 2)
    params = model.parameters(mesh.tp, torch.bfloat16)
    optimizer = Optimizer(model.config(), Precision.remainder, params, mesh.tp, mesh.replicas)
    own = {weight.name: weight for weight in optimizer.weights}
    norm, matrix = (next(p for p in params if p.name == name) for name in ("norm.weight", "case_a.weight"))
    if norm.name in own and mesh.tp.rank == 1:
        own[norm.name].data.view(-1)[5] += 1.0
    if matrix.name not in own:
        matrix.tensor.data.view(-1)[7] += 1.0
    names = optimizer.resync_replicas()
    optimizer.owners.check_equal()
    return names, model.local_values(params)


def test_a_killed_write_is_repaired():
    """Within the replica that owns a tensor, and then on the others; what was not touched keeps its bits."""
    results = run_ranks(repair, 4)
    assert sorted(names for names, _ in results) == [[], [], ["norm.weight"], ["norm.weight"]]
    for key, value in model.assemble([values for _, values in results[:2]]).items():
        torch.testing.assert_close(value, model.weights()[key].bfloat16().float(), rtol=0, atol=0)


def differ(world: TPGroup) -> str:
    mesh = Mesh.build(world, 1)
    params = model.parameters(mesh.tp)
    optimizer = Optimizer(model.config(), Precision.remainder, params, mesh.tp, mesh.replicas)
    if world.rank == 1:
        params[3].tensor.data.view(-1)[5] += 1e-7
    try:
        optimizer.owners.check_equal()
    except ReplicaError as error:
        return str(error)
    return ""


def test_replicas_that_differ_are_named():
    """One bit of one tensor on one replica: an error on all, with the tensor and the replica."""
    for message in run_ranks(differ, 2):
        assert f"{model.SPECS[3].name} on replica 1" in message


def refused(world: TPGroup) -> list[str]:
    messages = []
    for call in (
        lambda: Mesh.build(world, 3),
        lambda: Optimizer(
            model.config(),
            Precision.remainder,
            model.parameters(TPGroup.single())[:3],
            TPGroup.single(),
            Mesh.build(world, 1).replicas,
        ),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_divided_is_refused():
    """Ranks that are no multiple of the shards, and more replicas than tensors."""
    assert all("expected a multiple of 3" in m[0] and "got 4" in m[1] for m in run_ranks(refused, 4))
