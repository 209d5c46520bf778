"""Saving and resuming: any number of ranks to any other, on the same trajectory; refusals."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apollo_tp.checkpoint import optimizer_state
from apollo_tp.checkpoint.optimizer_state import COUNTERS
from apollo_tp.config import OptimizerKind, Precision
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import CheckpointError
from apollo_tp.optim import Optimizer, rounding
from tests.support import optim_model as model
from tests.support.ranks import run_ranks

BEFORE, AFTER = 4, 3  # refreshes at steps 3 and 6: the save is inside an interval
DTYPES = ("float32", "bfloat16")


def run(
    tp: TPGroup,
    start: dict | None,
    dtype: str,
    steps: tuple[int, int],
    load: str = "",
    save: str = "",
    mesh: Mesh | None = None,
) -> dict:
    """Local weights after ``steps`` from ``start`` (whole weights), having loaded before and saved after them."""
    params = model.parameters(tp, getattr(torch, dtype))
    for p in params if start else ():
        p.tensor.data.copy_(model.part(start[p.name], p.shard))
    replicas = (mesh or Mesh.single(tp)).replicas
    optimizer = Optimizer(model.config(refresh_every=3), Precision.remainder, params, tp, replicas)
    if load:
        optimizer_state.load(optimizer, Path(load))
    assert optimizer.step_count == steps[0]
    for step in range(*steps):
        model.set_gradients(params, {name: g / replicas.size for name, g in model.gradients(step).items()})
        assert optimizer.step().skipped == ""
    if save:
        optimizer_state.save(optimizer, Path(save))
    return model.local_values(params)


def whole_and_half(tp: TPGroup, folder: str) -> dict[str, tuple[dict, dict]]:
    """By dtype: the weights of an uninterrupted run, and those at the moment of a save."""
    result = {}
    for dtype in DTYPES:
        end = run(tp, None, dtype, (0, BEFORE + AFTER))
        result[dtype] = end, run(tp, None, dtype, (0, BEFORE), save=f"{folder}/{tp.size}-{dtype}")
    return result


def resume(tp: TPGroup, folder: str, saved_at: int, middles: dict[str, dict]) -> dict[str, dict]:
    """By dtype: the end of a run that continues from ``middles`` and the saved state."""
    steps = (BEFORE, BEFORE + AFTER)
    return {d: run(tp, middles[d], d, steps, load=f"{folder}/{saved_at}-{d}") for d in DTYPES}


def test_resume_continues_the_trajectory(tmp_path):
    """Saved at 4, 2 or 1 ranks and loaded at any other number, the end is that of an uninterrupted run."""
    folder, start, ends, middles = str(tmp_path), model.weights(), {}, {}
    for size in (4, 1):
        results = run_ranks(whole_and_half, size, folder, deadline_seconds=240)
        ends[size] = {d: model.assemble([r[d][0] for r in results]) for d in DTYPES}
        middles[size] = {d: model.assemble([r[d][1] for r in results]) for d in DTYPES}
    for saved_at, loaded_at in ((4, 1), (4, 2), (1, 4), (1, 1)):
        results = run_ranks(resume, loaded_at, folder, saved_at, middles[saved_at])
        for dtype in DTYPES:
            resumed = model.assemble([r[dtype] for r in results])
            for name, value in ends[saved_at][dtype].items():
                error = float((resumed[name] - value).abs().max())
                if saved_at == loaded_at:
                    assert error == 0.0, name  # nothing is lost on disk
                elif dtype == "float32":  # other sum orders over ranks
                    assert error <= 1e-4 * float((value - start[name]).abs().max()), name
                else:  # of the visible bf16 weights the last bit, 2**-7 of 0.09, may differ
                    assert error <= 0.09 * 2**-7, name


def run_mesh(world: TPGroup, tp_size: int, *arguments: object) -> dict:
    """``run`` on replicas of ``tp_size`` ranks, each of which has a part of every gradient."""
    mesh = Mesh.build(world, tp_size)
    return run(mesh.tp, *arguments, mesh=mesh)  # type: ignore[arg-type]


def test_state_of_replicas_is_loaded_at_any_number(tmp_path):
    """Saved by two replicas of two ranks and loaded by one rank, by four replicas of one, by one of four, and by as many:
    the end is that of an uninterrupted run."""
    folder, start, steps = str(tmp_path / "state"), model.weights(), (BEFORE, BEFORE + AFTER)
    end = model.assemble(run_ranks(run_mesh, 4, 2, None, "float32", (0, BEFORE + AFTER))[:2])
    middle = model.assemble(run_ranks(run_mesh, 4, 2, None, "float32", (0, BEFORE), "", folder)[:2])
    for num_replicas, tp_size in ((1, 1), (4, 1), (1, 4), (2, 2)):
        results = run_ranks(run_mesh, num_replicas * tp_size, tp_size, middle, "float32", steps, folder)
        for replica in range(num_replicas):
            resumed = model.assemble(results[replica * tp_size : (replica + 1) * tp_size])
            for name, value in end.items():
                error, moved = (float((t - value).abs().max()) for t in (resumed[name], start[name]))
                assert error <= (0.0 if (num_replicas, tp_size) == (2, 2) else 1e-4 * moved), name


def save_at(tp: TPGroup, folder: str) -> None:
    run(tp, None, "bfloat16", (0, 2), save=folder)


def test_saved_files_are_safetensors_in_global_coordinates(tmp_path):
    """No pickle on disk; moments fp32, remainders int8; the boxes of all ranks tile each tensor exactly once."""
    folder = tmp_path / "state"
    run_ranks(save_at, 4, str(folder))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    covered: dict[str, int] = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                tensor = file.get_tensor(key)
                assert tensor.dtype is (torch.int8 if key.endswith(".remainder") else torch.float32), key
                covered[key] = covered.get(key, 0) + tensor.numel()
    shapes = {spec.name: spec.shape for spec in model.SPECS}
    assert covered["case_c.weight.exp_avg"] == 96 * 8
    assert covered["case_c_odd.weight.exp_avg_sq"] == 97 * 8
    assert covered["norm.weight.exp_avg"] == 64
    for name, shape in shapes.items():
        assert covered[f"{name}.remainder"] == torch.Size(shape).numel()


def single(folder: Path, precision: Precision = Precision.remainder, **changes):
    """An optimizer of one rank on bf16 weights, loaded from ``folder``."""
    params = model.parameters(TPGroup.single(), torch.bfloat16)
    optimizer = Optimizer(replace(model.config(refresh_every=3), **changes), precision, params, TPGroup.single())
    optimizer_state.load(optimizer, folder)
    return optimizer


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    """Another rank, optimizer or set of parameters is refused with both values; reset_state starts afresh."""
    folder = tmp_path / "state"
    save_at(TPGroup.single(), str(folder))
    assert single(folder).step_count == 2
    with pytest.raises(CheckpointError, match=r"optim.rank: got 8 saved, expected 4.*optim.reset_state=true"):
        single(folder, rank=4)
    with pytest.raises(CheckpointError, match=r"optim.kind: got 'apollo' saved, expected 'adamw'"):
        single(folder, kind=OptimizerKind.adamw)
    assert single(folder, rank=4, reset_state=True).step_count == 0
    # another precision fits: the remainder is not needed
    assert single(folder, Precision.stochastic).step_count == 2


def test_missing_files_are_noticed(tmp_path):
    """A folder without one rank's files, or without counters, is refused and names what is missing."""
    folder = tmp_path / "state"
    run_ranks(save_at, 2, str(folder))
    for path in (folder / "rank-00001.part-0").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete.*case_a.weight.exp_avg \(384 elements\)"):
        single(folder)
    assert json.loads((folder / COUNTERS).read_text())["step_count"] == 2
    (folder / COUNTERS).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.json"):
        single(folder)


def save_fp32(tp: TPGroup, folder: str) -> None:
    run(tp, None, "float32", (0, 2), save=folder)


def test_state_of_fp32_weights_loads_into_bf16_ones(tmp_path):
    """No remainder was saved, so it stays zero; one that was saved in part alone is still missed."""
    run_ranks(save_fp32, 2, str(tmp_path / "fp32"))
    optimizer = single(tmp_path / "fp32")
    assert optimizer.step_count == 2
    remainders = [weight.remainder for weight in optimizer.weights]
    assert len(remainders) == len(model.SPECS)
    assert not any(remainder.any() for remainder in remainders)

    run_ranks(save_at, 2, str(tmp_path / "bf16"))
    path = next((tmp_path / "bf16" / "rank-00001.part-0").iterdir())
    _rename_in_header(path, b"case_a.weight.remainder", b"case_a.weight.elsewhere")
    with pytest.raises(CheckpointError, match=r"missing of 1: case_a.weight.remainder \(\d+ elements\)"):
        single(tmp_path / "bf16")


def joined(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The weights with their remainders, fp32."""
    return {w.name: rounding.join(w.data, w.remainder) for w in optimizer.weights}


def save_with(tp: TPGroup, folder: str, precision: Precision) -> None:
    """Two steps, and their state."""
    params = model.parameters(tp, torch.bfloat16)
    optimizer = Optimizer(model.config(refresh_every=3), precision, params, tp)
    for step in range(2):
        model.set_gradients(params, model.gradients(step))
        optimizer.step()
    optimizer_state.save(optimizer, Path(folder))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(Precision.remainder, Precision.remainder16), (Precision.remainder16, Precision.remainder)],
)
def test_remainders_of_either_size_are_read(tmp_path, saved, loaded):
    """Saved by two ranks with one precision and read with the other: the same numbers, to the 24 bits that both have."""
    run_ranks(save_with, 2, str(tmp_path), saved)
    both = [single(tmp_path, precision) for precision in (saved, loaded)]
    control = ComputeControl(TPGroup.single(), both[1].device)
    optimizer_state.check(both[1], tmp_path, control, [control])  # checksums are of what is in the file
    for (name, exact), got in zip(joined(both[0]).items(), joined(both[1]).values(), strict=True):
        assert bool(both[1].weights[0].remainder.any())
        assert bool(((got - exact).abs() <= exact.abs() * 2.0**-15).all()), name
        if saved is Precision.remainder:
            assert torch.equal(got, exact), name


def _rename_in_header(path: Path, key: bytes, other: bytes) -> None:
    """``key`` is not in the safetensors file any more; the names are as long as each other."""
    content = path.read_bytes()
    assert content.count(key) >= 1
    path.write_bytes(content.replace(key, other))


def fail_to_save(tp: TPGroup, folder: str) -> str:
    """What a rank says of files that may not grow."""
    optimizer = Optimizer(model.config(), Precision.remainder, model.parameters(tp, torch.bfloat16), tp)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            optimizer_state.save(optimizer, Path(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return str(caught.value)


def test_a_write_that_fails_says_why(tmp_path):
    """Not only that one of the library's ranks has failed."""
    for message in run_ranks(fail_to_save, 2, str(tmp_path / "state")):
        assert "File too large" in message
        assert "CheckpointException" not in message
        assert "Traceback" not in message
