"""bf16 writes across ranks: the same bits at 1, 2 and 4 ranks, and replicas that stay identical."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apollo_tp.config import Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ReplicaError
from apollo_tp.optim import Optimizer
from tests.support import optim_model as model
from tests.support.ranks import run_ranks

STEPS = 4
CROSSES_RANKS = {  # a sum over ranks enters the update; its order depends on their number
    "case_c.weight",
    "case_c_odd.weight",
    "case_d.weight",
    "square_row.weight",
    "k_proj.weight",
    "in_proj_wide.weight",
    "qkv_wide.weight",
}


def train(tp: TPGroup) -> dict[str, dict[str, np.ndarray]]:
    """Local bf16 weights and remainders after some steps, by precision; limiter and clipping off (they sum over ranks)."""
    result = {}
    for precision in Precision:
        params = model.parameters(tp, torch.bfloat16)
        config = model.config(norm_growth_limit=None, max_grad_norm=None, check_replicas_every=1)
        optimizer = Optimizer(config, precision, params, tp)
        for step in range(STEPS):
            model.set_gradients(params, model.gradients(step))
            assert optimizer.step().skipped == ""
        remainders = {
            w.name: w.remainder.view(w.shard.local_shape) for w in optimizer.weights if w.remainder is not None
        }
        result[precision.value] = model.local_values(params)
        result[f"{precision.value} rest"] = {name: rest.numpy().astype(np.float32) for name, rest in remainders.items()}
    return result


def test_bits_do_not_depend_on_the_number_of_ranks():
    """Where nothing is summed over ranks, remainder and stochastic give the same bits at 1, 2 and 4 ranks.

    ``assemble`` checks that all replicas are bit-identical, for the exchanged matrices too.
    """
    results = {size: run_ranks(train, size) for size in (1, 2, 4)}
    for key in ("remainder", "remainder rest", "remainder16", "remainder16 rest", "stochastic", "nearest"):
        whole = {size: model.assemble([r[key] for r in ranks]) for size, ranks in results.items()}
        for name, value in whole[1].items():
            for size in (2, 4):
                same = torch.equal(whole[size][name], value)
                assert same or name in CROSSES_RANKS, f"{name} at {size} ranks, {key}"


def diverge(tp: TPGroup, name: str, row: int) -> str:
    """Change one bit of one replica on rank 3, and train on."""
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(check_replicas_every=2), Precision.remainder, params, tp)
    if tp.rank == 3:
        changed = next(p for p in params if p.name == name)
        changed.tensor.data.view(torch.int16)[row, 2] ^= 1
    model.set_gradients(params, model.gradients(0))
    optimizer.step()
    with pytest.raises(ReplicaError) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "ranks"),
    [("k_proj.weight", 1, [2, 3]), ("qkv_wide.weight", -1, [2, 3]), ("qkv_tall.weight", -1, [0, 1, 2, 3])],
    ids=["whole", "in part", "in part of a range"],
)
def test_replicas_that_differ_are_found_on_every_rank(name, row, ranks):
    """One flipped bit on rank 3 raises on all ranks, naming the tensor and the ranks that should agree: also in the key and
    value rows of a fused tensor whose query rows are this rank's alone, and where these form one range with the query rows,
    as on the last rank alone."""
    messages = run_ranks(diverge, 4, name, row)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{name}: got checksums")
    assert f"ranks {ranks}" in messages[0]


def kill_a_write(tp: TPGroup, names: list[str]) -> tuple[list[str], list[str]]:
    """Rank 3 alone has changed some weights; resync, and train on with a check in every step. Returns what was found to
    differ, and what was changed on this rank."""
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(check_replicas_every=1), Precision.remainder, params, tp)
    if tp.rank == 3:
        for name in names:
            next(p for p in params if p.name == name).tensor.data.view(torch.int16)[-1, 2:] ^= 1
    before = {p.name: p.tensor.clone() for p in params}
    found = optimizer.resync_replicas()
    changed = [p.name for p in params if not torch.equal(p.tensor, before[p.name])]
    assert optimizer.resync_replicas() == []
    model.set_gradients(params, model.gradients(0))
    optimizer.step()
    return found, changed


def test_replicas_that_a_killed_write_left_different_are_resynced():
    """A whole replica, and the key and value rows of a fused tensor, take the bits of the lower rank, which keeps its own;
    nothing else changes, this rank's own rows included. A later step's check passes."""
    names = ["k_proj.weight", "qkv_tall.weight", "qkv_wide.weight"]
    assert run_ranks(kill_a_write, 4, names) == [(names, [])] * 3 + [(names, names)]
