"""Collectives that never happened, each of a step in turn: what an aborted communicator leaves must not reach a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from apollo_tp.config import GradientMode, OptimConfig, OptimizerKind, Precision, SyncMode
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CollectiveError
from apollo_tp.inspect.exactness import samples
from apollo_tp.optim import Optimizer, in_backward
from apollo_tp.training.update_gate import UpdateGate
from tests.support import optim_model as model
from tests.support.collective_faults import LEAVES, Collectives
from tests.support.gradient_runs import ONE_BATCH, Run
from tests.support.optim_model import loss_of
from tests.support.ranks import run_ranks, start_origins


@pytest.fixture(scope="module", autouse=True)
def origins() -> None:
    """The third and fourth import while the first two work: a rank waits a minute for the others, no longer."""
    start_origins(4)


class Second:
    """The second step of an optimizer, taken again and again from the same state.

    ``written``: after how many collectives of it each parameter is written, and ``num_calls``: how many it has.
    """

    def __init__(self, tp: TPGroup, config: OptimConfig, updates_in_backward: bool) -> None:
        self.collectives, self.updates_in_backward = Collectives(tp), updates_in_backward
        self.params = model.parameters(tp, torch.bfloat16)
        self.optimizer = Optimizer(config, Precision.remainder, self.params, tp)
        groups = [self.optimizer.update_group]
        if updates_in_backward:
            self.optimizer.attach_in_backward()
            assert self.optimizer.in_backward is not None
            groups = self.optimizer.in_backward.groups
        self.written: dict[str, int] = {}
        self.first = 0
        for group in groups:
            self._note_writes(group.backend, [weight.name for weight in group.weights])
        self.step(0)
        self.state = [t.clone() for t in self.live()]
        self.steps, self.before = list(self.optimizer.update_group.steps), self.values()
        self.first = self.collectives.count
        self.step(1)
        self.num_calls = self.collectives.count - self.first
        self.sound, self.order = self.values(), dict(self.written)
        assert any(not torch.equal(self.before[name], self.sound[name]) for name in self.sound)

    def _note_writes(self, backend: object, names: list[str]) -> None:
        write = backend.write  # type: ignore[attr-defined]

        def noting(*args: object) -> None:
            self.written |= dict.fromkeys(names, self.collectives.count - self.first)
            write(*args)

        backend.write = noting  # type: ignore[attr-defined]

    def step(self, number: int) -> str:
        self.optimizer.zero_grad()
        whole, loss = model.gradients(number), torch.tensor(1.0)
        if self.updates_in_backward:
            self.optimizer.begin_step_in_backward(loss=loss)
        loss_of(self.params, whole).backward()
        return self.optimizer.step(loss=loss).skipped

    def live(self) -> list[Tensor]:
        """All tensors that a step moves."""
        group, weights = self.optimizer.update_group, self.optimizer.weights
        moments = [t for g in (*group.groups, *group.adamw.values()) for t in (g.exp_avg, g.exp_avg_sq)]
        remainders = [w.remainder for w in weights if w.remainder is not None]
        counters = [group.counters.limiter_norms, group.counters.weight_norms]
        return [*moments, *remainders, *(w.data for w in weights), *counters]

    def restore(self) -> None:
        for tensor, kept in zip(self.live(), self.state, strict=True):
            tensor.copy_(kept)
        self.optimizer.update_group.counters.steps[:] = self.steps
        self.optimizer.step_count = 1

    def values(self) -> dict[str, Tensor]:
        """Weights, each with its remainder and, as one, its count of updates."""
        counts = self.optimizer.update_group.steps
        return {
            w.name: torch.cat([w.data.flatten().float(), w.remainder.flatten().float(), torch.tensor([float(count)])])
            if w.remainder is not None
            else torch.cat([w.data.flatten(), torch.tensor([float(count)])])
            for w, count in zip(self.optimizer.weights, counts, strict=True)
        }

    def wrong(self, at: int, leave: str, here: bool) -> list[str]:
        """What a fault does that it must not. ``here``: it is on this rank."""
        case = f"{self.collectives.log[self.first + at]} number {at} of {self.num_calls} leaves {leave}"
        self.restore()
        found = []
        try:
            with self.collectives.fault(at, leave, here):
                skipped = self.step(1)
            if here:
                found.append(f"{case}: no error, skipped: {skipped!r}")
        except CollectiveError:
            pass
        for name, value in self.values().items():
            right = self.sound if self.order[name] <= at else self.before
            kinds = [right] if here else [self.sound, self.before]  # another rank may have what this one lacks
            if not any(torch.equal(value, kind[name]) for kind in kinds):
                found.append(
                    f"{case}: {name} {'is' if here else 'holds neither what it was nor'} what it should not be"
                )
        return found


def on_all_ranks(tp: TPGroup, config: OptimConfig, updates_in_backward: bool) -> tuple[list[str], int]:
    """(what is wrong, how many collectives a step has)"""
    in_backward.BUCKET_BYTES = 10_000
    second = Second(tp, config, updates_in_backward)
    leaves = (
        list(LEAVES) if tp.size == 2 else ["what was there", "noise", "what looks right"]
    )  # four processes are slow
    found = [w for at in range(second.num_calls) for leave in leaves for w in second.wrong(at, leave, here=True)]
    second.restore()
    second.optimizer.rejoin()  # the weights' norms are measured again, of the same weights
    assert second.step(1) == ""
    if not all(torch.equal(value, second.sound[name]) for name, value in second.values().items()):
        found.append("a sound step after the faults is not what it was before them")
    return found, second.num_calls


def on_one_rank(tp: TPGroup, config: OptimConfig, updates_in_backward: bool) -> tuple[list[str], int]:
    """As above; the last rank alone has the fault. All others must be stopped by it too, unless it is in the last collective
    before a write."""
    in_backward.BUCKET_BYTES = 10_000
    second, found = Second(tp, config, updates_in_backward), []
    here, last_before_write = tp.rank == tp.size - 1, {n - 1 for n in second.order.values()}
    for at in range(second.num_calls):
        for leave in LEAVES:
            found += second.wrong(at, leave, here)
            stopped = [name for name, n in second.order.items() if n > at + (at in last_before_write)]
            values = second.values()
            moved = [name for name in stopped if not torch.equal(values[name], second.before[name])]
            found += [f"number {at} leaves {leave}: rank {tp.rank} writes {name} all the same" for name in moved]
    return found, second.num_calls


CLIPPED = {"max_grad_norm": 1.0}
PATHS = {  # (updates in the backward pass, options)
    "stored": (False, {"max_grad_norm": None}),
    "clipped": (False, CLIPPED),
    "mini": (False, {"kind": OptimizerKind.apollo_mini} | CLIPPED),
    "adamw": (False, {"kind": OptimizerKind.adamw, "max_grad_norm": None}),
    "in backward": (True, {"max_grad_norm": None}),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_written_from_a_collective_that_never_happened(path: str, size: int) -> None:
    """Whichever of a step it is, and whatever it leaves: parameters that would be written later keep their bits, and the
    step raises. Those behind the last write (norms of the weights, checksums of replicas) raise too."""
    updates_in_backward, options = PATHS[path]
    config = model.config(refresh_every=1, check_replicas_every=1, **options)
    for rank, (wrong, num_calls) in enumerate(
        run_ranks(on_all_ranks, size, config, updates_in_backward, deadline_seconds=250)
    ):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"
        assert num_calls >= {"adamw": 4, "mini": 6, "in_backward": 12}.get(path, 6)


@pytest.mark.parametrize("path", PATHS)
def test_what_one_rank_lacks_stops_all(path: str) -> None:
    """All ranks but one have what they should: that one writes nothing, nor do they, unless they lack nothing to the
    last."""
    updates_in_backward, options = PATHS[path]
    config = model.config(check_replicas_every=0, **options)
    for rank, (wrong, _) in enumerate(run_ranks(on_one_rank, 2, config, updates_in_backward, deadline_seconds=250)):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"


def whole_step(tp: TPGroup, folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Faults in the collectives that complete gradients, on the last rank alone: (what is wrong, these collectives)."""
    collectives, found = Collectives(tp), []
    run = Run(tp, folder, name, GradientMode.stored)
    finish, span, batch = run.trainer.model.finish_gradients, [0, 0], samples(lengths=ONE_BATCH)

    def spanned(*, compare: bool = False) -> Tensor | None:
        span[0] = collectives.count
        received = finish()  # without the comparison, which would raise, and is not in every step
        span[1] = collectives.count
        return received

    run.trainer.model.finish_gradients = spanned  # type: ignore[method-assign]
    start, begin = run.values(), collectives.count
    run.trainer.step(batch)
    calls, first = collectives.log[span[0] : span[1]], span[0] - begin
    before = run.values()
    assert any(not torch.equal(start[n], value) for n, value in before.items())
    for at, call in enumerate(calls):
        for leave in LEAVES:
            with collectives.fault(first + at, leave, tp.rank == tp.size - 1):
                try:
                    run.trainer.step(batch)
                    found.append(f"{call} leaves {leave}: no error")
                except CollectiveError:
                    run.trainer.abandon_step()
            moved = [n for n, value in run.values().items() if not torch.equal(value, before[n])]
            found += [f"{call} leaves {leave}: {n} was written" for n in moved]
    assert run.trainer.weight_version == 1
    assert run.trainer.step(batch).skipped == ""
    return found, calls


@pytest.mark.parametrize("name", ["qwen3", "one KV head", "fused rows replicated in part"])
def test_gradients_that_other_ranks_did_not_complete_are_not_learned(name: str, checkpoints: Path) -> None:
    """Sums over replicas, and broadcasts of what all ranks have: no rank writes if one lacks them."""
    for rank, (wrong, calls) in enumerate(run_ranks(whole_step, 2, checkpoints, name, deadline_seconds=250)):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"
        assert {call.split()[0] for call in calls} == {"all_reduce", "broadcast"}


def repair(tp: TPGroup) -> list[str]:
    """Faults in each collective of a repair, on all ranks, and on one where the others can tell."""
    collectives, found = Collectives(tp), []
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(), Precision.remainder, params, tp)
    model.set_gradients(params, model.gradients(0))
    assert optimizer.step().skipped == ""  # remainders are zero before
    live = {w.name: [t for t in (w.data, w.remainder) if t is not None] for w in optimizer.weights}

    def kept() -> dict[str, list[Tensor]]:
        return {name: [t.clone() for t in tensors] for name, tensors in live.items()}

    def is_as(other: dict[str, list[Tensor]], name: str) -> bool:
        return all(torch.equal(a, b) for a, b in zip(live[name], other[name], strict=True))

    good = kept()
    names = ["router.weight", "norm.weight", "qkv_tall.weight"]

    def damage() -> dict[str, list[Tensor]]:
        for name, tensors in live.items():
            for tensor, right in zip(tensors, good[name], strict=True):
                tensor.copy_(right)
            if tp.rank == tp.size - 1 and name in names:
                tensors[0].view(torch.int16)[-1, -1] ^= 1
        return kept()

    damage()
    first = collectives.count
    assert set(optimizer.resync_replicas()) == set(names)
    calls = collectives.log[first:]
    assert all(is_as(good, name) for name in live)
    for at, call in enumerate(calls):
        for leave in LEAVES:
            # behind an all-reduce all ranks agree, but for one that was aborted, which ends
            alone = call.startswith("all_reduce") and leave != "what looks right"
            for ranks in ["all", "the last"][: 1 + alone]:
                damaged, case = damage(), f"{call} number {at} leaves {leave} on {ranks}"
                try:
                    with collectives.fault(at, leave, ranks == "all" or tp.rank == tp.size - 1):
                        optimizer.resync_replicas()
                    found.append(f"{case}: no error")
                except CollectiveError:
                    pass
                bad = [name for name in live if not is_as(damaged, name) and not is_as(good, name)]
                found += [f"{case}: {name} is neither what it was nor what it should be" for name in bad]
    damage()
    optimizer.resync_replicas()
    assert all(is_as(good, name) for name in live)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_are_repaired_from_nothing_that_was_not_checked(size: int) -> None:
    for rank, wrong in enumerate(run_ranks(repair, size, deadline_seconds=250)):
        assert not wrong, f"rank {rank}: {len(wrong)}, such as {wrong[:3]}"


def agreements(tp: TPGroup) -> list[str]:
    """What is decided on the host, before a write: that the server stands still, and what may be written in the backward
    pass."""
    collectives, found = Collectives(tp), []
    gate = UpdateGate(SyncMode.drain, tp, torch.device("cpu"), None)
    optimizer = Optimizer(model.config(max_grad_norm=None), Precision.remainder, model.parameters(tp), tp)
    for what, count in ((gate.before_write, 2), (optimizer.attach_in_backward, 1)):
        for at in range(count):
            for leave in LEAVES:
                try:
                    with collectives.fault(at, leave, here=True):
                        what()
                    found.append(f"{what.__qualname__}, number {at} leaves {leave}: no error")
                except CollectiveError:
                    pass
        what()
    return found


def test_ranks_that_could_not_agree_do_not_go_on() -> None:
    assert run_ranks(agreements, 2) == [[], []]
