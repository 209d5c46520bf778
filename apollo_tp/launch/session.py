"""One rank's life: join, find the server, map, bind, resume, serve commands, leave in order."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from apollo_tp.checkpoint import CheckpointWriter, read_info
from apollo_tp.checkpoint.folder import OPTIMIZER_DIR, writer_lock
from apollo_tp.checkpoint.lineage import LineageFile
from apollo_tp.config import Config
from apollo_tp.distributed.control import Control
from apollo_tp.distributed.tp_group import TPGroup, compute_group
from apollo_tp.errors import ConfigError, RankFailedError, ServerGoneError
from apollo_tp.gpu_sharing import mps as qos
from apollo_tp.gpu_sharing import sm_limit as sm_share
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.gpu_sharing.product_check import check_products
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.launch.distributed import World, join
from apollo_tp.launch.progress import StepProgress
from apollo_tp.launch.server_watch import ServerWatch
from apollo_tp.model import BoundModel, bind_model
from apollo_tp.model.served_config import as_served
from apollo_tp.optim import Optimizer, build_optimizer
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import check_agreement, read_instance, served_models, wait_for_server
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import MappedRank, map_rank, verify_against_checkpoint
from apollo_tp.training.coordinator_link import Link
from apollo_tp.training.cuda_graphs import Replays
from apollo_tp.training.memory_profiling import CudaMeter, plan_memory
from apollo_tp.training.rank_loop import RankLoop
from apollo_tp.training.trainer import Trainer
from apollo_tp.training.update_gate import Lock, UpdateGate, needs_lock
from apollo_tp.wire import commands

log = logging.getLogger("apollo_tp")


@dataclass(frozen=True)
class _Start:
    """What every part of the start-up works with; ``stack`` undoes it."""

    config: Config
    world: World
    control: Control
    stack: contextlib.ExitStack


def run(config: Config, on_server_gone: Callable[[ServerGoneError], None]) -> None:
    """Train one server until told to stop. Every rank calls it. Raises ApolloTpError with what is wrong and what to do."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = join(2 * config.command_timeout_seconds)
    control = Control(world.rank, world.size)
    try:
        with contextlib.ExitStack() as stack:
            _run(_Start(config, world, control, stack), on_server_gone)
    finally:
        dist.destroy_process_group()


def _run(start: _Start, on_server_gone: Callable[[ServerGoneError], None]) -> None:
    config, control = start.config, start.control
    manifests, folder = _find_server(start)
    watch = ServerWatch(manifests, on_server_gone)
    start.stack.callback(watch.stop)
    mapped, lineage = _map(start, manifests, folder)
    tp = TPGroup(start.world.rank, start.world.size, peer_memory=config.train.peer_memory)

    def form() -> None:
        compute_group(tp, mapped.device, config.command_timeout_seconds)

    form()
    start.stack.callback(tp.dissolve)
    with _together(control):
        hf_config = AutoConfig.from_pretrained(manifests[0].model_path)
        served = as_served(hf_config, manifests[0].config_overrides, manifests[0].max_model_len)
        model, optimizer = _bind(config, served, mapped, tp)
    with _together(control):
        _resume(config, optimizer, lineage)
    gate = _update_gate(start, folder, lineage.record.weight_version, tp, mapped.device)
    trainer = _make_trainer(config, model, optimizer, tp, mapped.device, gate, lineage)
    memory = _plan_memory(start, trainer)
    _check_products(start, trainer)
    hello = _hello(config, manifests, model, trainer, memory)
    checkpoints = _Checkpoints(config, mapped, tp, hf_config, trainer, lineage)
    link = _coordinate(start, folder, manifests[0])
    _serve(start, link, hello, trainer, checkpoints, lineage, gate, form)


def _find_server(start: _Start) -> tuple[list[Manifest], Path]:
    """The one server to train, awaited and read by every rank; it and the checkpoints' folder are locked by rank 0."""
    config, world, control = start.config, start.world, start.control
    base = instance_folder.base_dir(config.server.runtime_dir)
    name, seconds = "", config.server.wait_seconds
    with _together(control):
        if world.rank == 0:
            log.info("looking for a vLLM server with VLLM_PLUGINS=apollo in %s, for up to %.0f s", base, seconds)
        # on every rank: who waited for rank 0 in a collective would give up at that one's deadline
        name = wait_for_server(base, config.server.instance, seconds)[0].instance_id
        if world.rank == 0:
            start.stack.enter_context(instance_folder.trainer_lock(instance_folder.instance_dir(name, base)))
            start.stack.enter_context(writer_lock(Path(config.checkpoint.dir).resolve()))
    folder = base / control.broadcast(name.encode()).decode()
    with _together(control):
        manifests = read_instance(folder)
        check_agreement(manifests)
        if len(manifests) != world.size:
            raise ConfigError(
                f"trainer ranks: got {world.size}, expected {len(manifests)}, the server's tensor-parallel size; "
                f"start torchrun with --nproc-per-node {len(manifests)}"
            )
    if world.rank == 0:
        log.info("training server %s: %s, TP %d", folder.name, manifests[0].model_path, world.size)
    return manifests, folder


def _map(start: _Start, manifests: list[Manifest], folder: Path) -> tuple[MappedRank, LineageFile]:
    """The served memory of this rank, which is what the folder on disk says unless it was trained, and its history."""
    with _together(start.control):
        mapped = map_rank(manifests, start.world.rank)
    lineage = LineageFile(folder, manifests[0].model_path, keep=start.world.rank == 0)
    with _together(start.control):
        if not lineage.trained_here:
            compared = verify_against_checkpoint(mapped, start.config.server.verify_tensors)
            log.info("%d checkpoint tensors equal the served memory bit for bit", compared)
    if mapped.device.type == "cuda":
        torch.cuda.set_device(mapped.device)
        with _together(start.control):
            sm_share.confine(mapped.device, start.config.qos.sm_percent)
    return mapped, lineage


def _bind(config: Config, hf_config: PretrainedConfig, mapped: MappedRank, tp: TPGroup) -> tuple[BoundModel, Optimizer]:
    model = bind_model(
        hf_config,
        mapped.tensors,
        tp,
        fused=mapped.fused,
        gradient_checkpointing=config.train.gradient_checkpointing,
        compiled=mapped.device.type == "cuda" if config.train.compile is None else config.train.compile,
    )
    return model, build_optimizer(config.optim, config.train.precision, model.parameters, tp)


def _make_trainer(
    config: Config,
    model: BoundModel,
    optimizer: Optimizer,
    tp: TPGroup,
    device: torch.device,
    gate: UpdateGate,
    lineage: LineageFile,
) -> Trainer:
    pace = Pace(config.qos.pace, model.module, tp, device)

    def before_write() -> None:
        lineage.before_write()
        gate.before_write()
        if gate.pauses:
            pace.hold()

    trainer = Trainer(
        model,
        optimizer,
        tp,
        device=device,
        max_micro_batch_tokens=config.train.max_micro_batch_tokens,
        gradients=config.train.gradients,
        weight_version=lineage.record.weight_version,
        before_write=before_write,
        pace=pace,
    )
    how = (optimizer.describe(), trainer.gradients.value, qos.describe(config.qos, device))
    log.info("optimizer: %s; gradients: %s; qos: %s", *how)
    return trainer


@contextlib.contextmanager
def _together(control: Control):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """A part of the start-up that all ranks finish, or all fail: nobody waits for a rank that raised."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must hear of it; raised again below
        error = caught
    answers = control.gather(str(error).encode() if error else b"")
    if error is not None:
        raise error
    failed = [(rank, text.decode()) for rank, text in enumerate(answers) if text]
    if failed:
        raise RankFailedError(f"rank {failed[0][0]} failed: {failed[0][1]}", rank=failed[0][0], traceback="")


def _resume(config: Config, optimizer: Optimizer, lineage: LineageFile) -> None:
    """Load the optimizer state that belongs to the served weights: of this instance's last checkpoint, or of the
    checkpoint that the server was started from. Mend what a killed trainer may have left of the weights. Collective."""
    source = Path(lineage.record.checkpoint)
    wanted = lineage.record.checkpoint and config.checkpoint.resume
    if wanted and config.optim.reset_state:
        log.warning(
            "optim.reset_state=true: fresh optimizer state, as at every start while it is set, not that of %s", source
        )
    elif wanted and not (source / OPTIMIZER_DIR).is_dir():
        log.warning(
            "%s: got no such folder, expected the optimizer state of the served weights, which starts afresh; to keep it, "
            "put the folder back and start the trainer again", source / OPTIMIZER_DIR,
        )  # fmt: skip
    elif wanted:
        from apollo_tp.checkpoint import optimizer_state

        optimizer_state.load(optimizer, source / OPTIMIZER_DIR)
        info = read_info(source)
        log.info("optimizer state of %s (weight version %s) loaded", source, info.weight_version if info else "?")
    if not config.optim.reset_state and lineage.record.step_count > optimizer.step_count:
        log.warning(
            "optimizer: got the state of its step %d, expected that of %d, after which the last trainer ended: moments are "
            "those of the last checkpoint, the schedule goes on", optimizer.step_count, lineage.record.step_count,
        )  # fmt: skip
        optimizer.step_count = lineage.record.step_count
    if lineage.trained_here and (names := optimizer.resync_replicas()):
        log.warning("ranks held different bits of %s (a trainer was killed as it wrote): now the lowest one's", names)


def _plan_memory(start: _Start, trainer: Trainer) -> str:
    """What the longest micro-batch will need, in one line. Collective. Raises DeviceMemoryError if it does not fit."""
    config = start.config
    memory = "not planned on a CPU, where attention keeps its scores: their need depends on the lengths in each batch"
    if trainer.device.type == "cuda":
        with _together(start.control):
            plan = plan_memory(trainer, CudaMeter(trainer.device), config.train.max_sequence_tokens)
        replays = config.train.cuda_graphs and plan.fits_replays(beside=False)
        if replays:
            replays = trainer.record_passes(Replays(trainer.model, beside=plan.fits_replays(beside=True)))
        memory = f"{plan.describe()}; steps that are alike are {'' if replays else 'not '}recorded"
    log.info("memory: %s", memory)
    return memory


def _check_products(start: _Start, trainer: Trainer) -> None:
    """Refuse a GPU that multiplies wrong, as some do under MPS. Raises DeviceError."""
    if trainer.device.type != "cuda":
        return
    model = trainer.model
    tensors = [*model.leaves, *(parameter.tensor for parameter in model.parameters)]  # joined, and their parts
    with _together(start.control):
        check_products(tensors, trainer.max_micro_batch_tokens, start.world.rank)
        torch.cuda.empty_cache()


def _update_gate(start: _Start, folder: Path, weight_version: int, tp: TPGroup, device: torch.device) -> UpdateGate:
    """How updates and running requests keep out of each other's way. Collective."""
    me = processes.ProcessId.of(os.getpid())
    assert me is not None
    answers = start.control.gather(msgspec.json.encode((me.pid, me.start_ticks)))
    ranks = [processes.ProcessId(*msgspec.json.decode(answer)) for answer in answers]
    sync, lock = start.config.sync, None
    with _together(start.control):
        if start.world.rank == 0 and needs_lock(sync):
            lock = Lock(folder, sync, weight_version, ranks)
            start.stack.callback(lock.close)
    return UpdateGate(sync.mode, tp, device, lock)


class _Checkpoints:
    """The rank loop's way to write checkpoints; the lineage file remembers the last one."""

    def __init__(
        self,
        config: Config,
        mapped: MappedRank,
        tp: TPGroup,
        hf_config: PretrainedConfig,
        trainer: Trainer,
        lineage: LineageFile,
    ) -> None:
        self._trainer, self._lineage = trainer, lineage
        self._writer = CheckpointWriter(
            Path(config.checkpoint.dir).resolve(),
            mapped.manifest.model_path,
            mapped.manifest.checkpoint,
            mapped.stored,
            tp,
            keep=config.checkpoint.keep,
            save_config=hf_config.save_pretrained,
            served=lambda: served_models(instance_folder.base_dir(config.server.runtime_dir)),
        )

    def save(self, name: str) -> tuple[str, int]:
        trainer = self._trainer
        path, num_bytes = self._writer.save(name, trainer.optimizer, trainer.weight_version)
        self._lineage.update(weight_version=trainer.weight_version, checkpoint=str(path))
        return str(path), num_bytes


def _coordinate(start: _Start, folder: Path, manifest: Manifest) -> Link | None:
    """On rank 0 the coordinator's process and the way to it."""
    if start.world.rank > 0:
        return None
    coordinator = CoordinatorProcess(start.config, folder, manifest)
    start.stack.callback(coordinator.stop)
    return Link(f"ipc://{instance_folder.socket_path(folder, 'ranks.sock')}", alive=coordinator.check)


def _serve(
    start: _Start,
    link: Link | None,
    hello: Callable[[str, int], commands.Hello],
    trainer: Trainer,
    checkpoints: _Checkpoints,
    lineage: LineageFile,
    gate: UpdateGate,
    form: Callable[[], None],
) -> None:
    """Commands, until told to stop."""
    progress = StepProgress()

    def on_step(command: commands.Step | commands.PreferenceStep, done: commands.StepDone) -> None:
        step = {"last_job_id": command.job_id, "last_job_step": command.job_step}
        lineage.update(weight_version=done.weight_version, step_count=trainer.optimizer.step_count, **step)
        if start.world.rank == 0:
            progress(command, done)

    loop = RankLoop(
        trainer,
        checkpoints,
        start.control,
        hello,
        link,
        form_group=form,
        on_step=on_step,
        last_step=(lineage.record.last_job_id, lineage.record.last_job_step),
        after_write=gate.after_step,
        after_failure=lineage.count_to,
    )
    loop.stop_on_signals()
    goodbye = commands.Goodbye(reason="the trainer raised", failed=True)
    try:
        goodbye = commands.Goodbye(reason=loop.run())
        log.info("leaving: %s", goodbye.reason)
    finally:
        progress.close()
        if link:
            link.close(goodbye)


def _hello(
    config: Config, manifests: list[Manifest], model: BoundModel, trainer: Trainer, memory: str
) -> Callable[[str, int], commands.Hello]:
    first = manifests[0]
    rows: list[dict[str, str | int | list[int]]] = [
        {
            "checkpoint": s.checkpoint,
            "rank": m.tp_rank,
            "served": s.served,
            "offset": s.box_offset,
            "shape": s.box_shape,
        }
        for m in manifests
        for s in m.segments
    ]
    limit = config.train.max_sequence_tokens
    shapes = {p.name: p.shard.global_shape for p in model.parameters}

    def hello(last_job_id: str, last_job_step: int) -> commands.Hello:
        return commands.Hello(
            protocol_version=commands.PROTOCOL_VERSION,
            instance_id=first.instance_id,
            server_life=f"{first.instance_id}@{first.pid}.{first.pid_start_ticks}",
            model_path=first.model_path,
            served_model_names=first.served_model_names,
            num_ranks=len(manifests),
            vocab_size=model.module.config.get_text_config().vocab_size,
            max_sequence_tokens=min(limit, first.max_model_len) if first.max_model_len else limit,
            weight_version=trainer.weight_version,
            num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
            optimizer=trainer.optimizer.describe(),
            gradients=trainer.gradients.value,
            sync=config.sync.mode.value,
            cache=config.sync.cache.value,
            memory=memory,
            qos=qos.describe(config.qos, trainer.device),
            layout=rows,
            last_job_id=last_job_id,
            last_job_step=last_job_step,
        )

    return hello


if sys.platform != "linux":  # memfd, /proc and flock are what this is made of
    raise ConfigError(f"platform: got {sys.platform}, expected linux; run the server and the trainer there")
