"""From options to a trainer that is ready, in five stages: join the ranks, take a place, map the server, bind, prepare.

Every rank runs each stage at the same time. A stage is a function of the record that the stage before it made, and returns
the next record, which has all fields of that one too. ``stack`` undoes the stages in reverse order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from transformers import PretrainedConfig

from apollo_tp.checkpoint import read_info
from apollo_tp.checkpoint.folder import OPTIMIZER_DIR, optimizer_folder, writer_lock
from apollo_tp.checkpoint.lineage import LineageFile
from apollo_tp.config import Config, Matmul
from apollo_tp.distributed.alarm import Alarm
from apollo_tp.distributed.control import ComputeControl, Control
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.peer_memory import PeerSums
from apollo_tp.distributed.tp_group import TPGroup, compute_group
from apollo_tp.errors import ApolloTpError, ConfigError
from apollo_tp.gpu_sharing import mps, sm_limit
from apollo_tp.gpu_sharing.pace import Pace
from apollo_tp.gpu_sharing.product_check import check_products
from apollo_tp.launch.coordinates import Arrangement, ServedRank, take
from apollo_tp.launch.coordinator_process import CoordinatorProcess
from apollo_tp.launch.distributed import World, join, leave, renumber
from apollo_tp.launch.forwarding import reach_coordinator, switch_captures
from apollo_tp.launch.histories import History, agree_on_record, partners, source_of
from apollo_tp.launch.hosts import Hosts, check_shared, find_servers, gather_manifests, meet
from apollo_tp.launch.restoring import Target, complete_restore
from apollo_tp.launch.server_watch import ServerWatch
from apollo_tp.model import BoundModel, bind_model
from apollo_tp.model.build import as_served, read_model_config
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.optim import Optimizer, rounding
from apollo_tp.optim.owners import check_equal
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import check_agreement, read_instance
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import MappedRank, map_rank, verify_against_checkpoint
from apollo_tp.training.cuda_graphs import GraphCache
from apollo_tp.training.memory_profiling import CudaMeter, plan_memory, reserve_peer_memory
from apollo_tp.training.trainer import Trainer
from apollo_tp.training.update_gate import Lock, UpdateGate, needs_lock

log = logging.getLogger("apollo_tp")

RESTORE_PATIENCE = 10.0
"""A restore may keep the server paused for this many times sync.max_pause_seconds."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The ranks can exchange messages."""

    config: Config
    stack: contextlib.ExitStack
    world: World
    hosts: Hosts
    """Where the ranks are, as the launcher numbers them."""
    control: Control
    coordinator: CoordinatorProcess | None = None
    """On rank 0: its child process, which says to clients what is waited for until the last stage is done."""

    def report(self, reason: str) -> None:
        """Say what this trainer waits for. On rank 0 only. Raises ConfigError if the coordinator cannot run."""
        if self.coordinator is not None:
            self.coordinator.waiting(reason)


@dataclass(frozen=True, kw_only=True)
class Placed(Joined):
    """The servers are found, and each rank knows beside which one it stands."""

    own: ServedRank | None
    """This rank's shard; None if it has none, while its server is away (``server.min_replicas``)."""
    arrangement: Arrangement
    """Which rank stands beside which shard of which replica."""
    servers: dict[str, list[Manifest]]
    """The manifests on this host of the servers to train."""


@dataclass(frozen=True, kw_only=True)
class Served(Placed):
    """The servers are locked, and the memory of the one's rank that this rank stands beside is mapped."""

    own: ServedRank
    folder: Path
    """The instance folder of this rank's server, one of the replicas."""
    manifests: list[Manifest]
    """The manifests of all ranks of that server, also of those on other hosts."""
    mapped: MappedRank
    lineage: LineageFile


@dataclass(frozen=True, kw_only=True)
class Bound(Served):
    """The model computes with the mapped weights, and its optimizer has the state that belongs to them."""

    mesh: Mesh
    alarm: Alarm
    hf_config: PretrainedConfig
    """The config in the model's folder."""
    model: BoundModel
    optimizer: Optimizer
    gate: UpdateGate


@dataclass(frozen=True, kw_only=True)
class Ready(Bound):
    """Steps can be run; their memory is planned."""

    trainer: Trainer
    memory: str
    """The memory plan, in one line."""


def join_ranks(config: Config, stack: contextlib.ExitStack) -> Joined:
    """Initialise the default process group. Collective over all ranks that the launcher started."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = join(2 * config.command_timeout_seconds)
    stack.callback(leave)
    control, coordinator = Control(world.rank, world.size), None
    hosts = meet(control, config)
    with control.agree():
        if world.rank == 0:
            coordinator = CoordinatorProcess(config, instance_folder.base_dir(config.server.runtime_dir))
            stack.callback(coordinator.stop)
    return Joined(config=config, stack=stack, world=world, hosts=hosts, control=control, coordinator=coordinator)


def take_place(joined: Joined) -> Placed:
    """Wait for the servers, and take the shard that this rank stands beside. From then on a rank's number is its place in
    the mesh of replicas; rank 0 keeps its number. Collective; raises what ``find_servers`` and ``take`` raise."""
    config = joined.config.server
    servers = find_servers(joined.control, joined.hosts, config, joined.report)
    own, arrangement = take(joined.control, joined.hosts, servers, spare=config.min_replicas is not None)
    names, world = arrangement.instances, joined.world
    if not (config.min_replicas or config.replicas) <= len(names) <= config.replicas:
        raise ConfigError(
            f"server.replicas: got {config.replicas}, expected {len(names)}, since ranks stand beside servers {names}"
        )
    if arrangement.is_permuted or len(arrangement.flat) < world.size:
        position = arrangement.position(world.rank, world.size)
        if own is not None and position != world.rank:
            log.info("rank %d of the launcher is rank %d from now on, as its server numbers it", world.rank, position)
        world = renumber(world, position, len(arrangement.flat))
        joined = dataclasses.replace(joined, world=world, control=Control(world.rank, world.size))
    if world.rank == 0:
        first = next(iter(servers.values()))[0]
        for instance, host in zip(names, arrangement.hosts, strict=True):
            log.info("training server %s on %s: %s, TP %d", instance, host, first.model_path, first.tp_size)
    return Placed(**vars(joined), own=own, arrangement=arrangement, servers=servers)


def map_server(placed: Placed, on_server_gone: Callable[[ApolloTpError], None]) -> Served:
    """Watch the server from now on, and map its memory, which must equal the model's folder unless it has been trained
    since. Collective. Raises what ``map_rank`` and ``verify_against_checkpoint`` raise, on all ranks."""
    joined, own, arrangement, servers = placed, placed.own, placed.arrangement, placed.servers
    assert own is not None
    config, folder = joined.config, instance_folder.base_dir(joined.config.server.runtime_dir) / own.instance
    leads = own.tp_rank == servers[own.instance][0].tp_rank  # the ranks of this server on this host
    _hold(joined, folder, own, leads, arrangement.instances[0], has_port=servers[own.instance][0].endpoints)
    with joined.control.agree():
        manifests = read_instance(folder)
        check_agreement(manifests)
    if any(arrangement.spread):
        manifests = gather_manifests(joined.control, next(m for m in manifests if m.tp_rank == own.tp_rank))
    for each in servers.values():
        joined.stack.callback(ServerWatch(each, on_server_gone).stop)
    with joined.control.agree():
        joined.report(f"{', '.join(servers)}: ready; the trainer maps the weights and builds the model")
        lineage = LineageFile(folder, manifests[0].model_path, keep=leads)
    if any(arrangement.spread):
        agree_on_record(joined.control, lineage, own.tp_rank, manifests[0].tp_size)
    with joined.control.agree():
        mapped = map_rank(manifests, own.tp_rank)
        if not lineage.trained_here:
            compared = verify_against_checkpoint(mapped, config.server.verify_tensors)
            log.info("%d checkpoint tensors equal the served memory bit for bit", compared)
        if mapped.device.type == "cuda":
            torch.cuda.set_device(mapped.device)
            sm_limit.limit_sms(mapped.device, config.qos.sm_percent)
    return Served(**vars(placed), folder=folder, manifests=manifests, mapped=mapped, lineage=lineage)


def _hold(joined: Joined, folder: Path, own: ServedRank, leads: bool, first: str, *, has_port: bool) -> None:
    """Be the one trainer of the server of ``folder``, and the one that writes checkpoints. Collective."""
    root = Path(joined.config.checkpoint.dir).resolve()
    with joined.control.agree():
        if leads:
            joined.stack.enter_context(instance_folder.trainer_lock(folder))
        if own.tp_rank == 0:
            service, stack = joined.config.service, joined.stack
            reach_coordinator(folder, first, joined.hosts, service, stack, has_port=has_port)
            switch_captures(folder, stack, on=joined.config.capture.enabled)
        if joined.world.rank == 0:
            joined.stack.enter_context(writer_lock(root))
    if joined.hosts.several:
        check_shared(joined.control, root)


def bind(served: Served, on_lost: Callable[[ApolloTpError], None]) -> Bound:
    """Form the compute group, bind the model and build its optimizer; load the state. Collective. ``on_lost`` is called in a
    thread when ranks on other hosts are gone (``Alarm.watch``)."""
    config, mapped, first = served.config, served.mapped, served.manifests[0]
    is_spread = served.arrangement.spread[served.world.rank // first.tp_size]
    if is_spread and config.train.peer_memory and mapped.device.type == "cuda":
        log.info("sums over tensor-parallel ranks go through NCCL: these are on several hosts (%s)", first.instance_id)
    world = TPGroup(served.world.rank, served.world.size, peers=PeerSums(config.train.peer_memory and not is_spread))
    alarm = Alarm.join(served.control, served.world.store)
    world.on_leave, alarm.on_lost = alarm.ring, on_lost
    compute_group(world, mapped.device, config.command_timeout_seconds)
    mesh = Mesh.build(world, first.tp_size)
    served.stack.callback(world.dissolve)
    served.stack.callback(alarm.stop)
    alarm.watch(world)
    gate = _update_gate(served, mesh, alarm)
    write = functools.partial(before_restore, served.lineage, gate)
    if complete_restore(Target(mapped, mesh, served.lineage, write)):
        gate.after_step(served.lineage.record.weight_version)
    compiled = mapped.device.type == "cuda" if config.train.compile is None else config.train.compile
    with served.control.agree():
        trust = config.model.trust_remote_code
        hf_config = read_model_config(first.model_path, trust_remote_code=trust)
        model = bind_model(
            as_served(hf_config, first.config_overrides, first.max_model_len),
            mapped.tensors,
            mesh.tp,
            fused_tensors=mapped.fused_tensors,
            gradient_checkpointing=config.train.gradient_checkpointing,
            compiled=CompileOptions() if compiled else None,
            fp8=config.train.matmul is Matmul.fp8,
            trust_remote_code=trust,
        )
        precision, chosen = rounding.choose(config.train.precision, config.optim.lr)
        if chosen and served.world.rank == 0:
            log.info("%s", chosen)
        optimizer = Optimizer(config.optim, precision, model.parameters, mesh.tp, mesh.replicas)
    with served.control.agree():
        unify_replicas(served, mesh.replicas, optimizer)
    with served.control.agree():
        resume(config, optimizer, served.lineage)
    parts = {"mesh": mesh, "alarm": alarm, "hf_config": hf_config, "model": model, "optimizer": optimizer, "gate": gate}
    return Bound(**vars(served), **parts)  # type: ignore[arg-type]


def unify_replicas(served: Served, replicas: TPGroup, optimizer: Optimizer) -> None:
    """Fill replicas whose server was started again from one that has the trained weights, and compare all that is served,
    bit for bit. Collective. Raises ReplicaError, on all ranks, if replicas were trained apart or differ."""
    lineage, own = served.lineage, replicas.rank
    if optimizer.owners is None:
        if lineage.record.partners:  # those that are away
            lineage.share(lineage.record.life, partners(lineage.record, [served.manifests[0].life]))
        return
    labels = served.arrangement.labels()
    whole = not lineage.record.restoring  # else it missed how others completed a restore
    history = History(lineage.trained_here and whole, lineage.record, served.manifests[0].life)
    rows = ComputeControl(replicas, optimizer.device).gather(msgspec.json.encode(history))
    histories = [msgspec.json.decode(row, type=History) for row in rows]
    source = source_of(histories, labels)
    if source is not None:
        behind = histories[own].state != histories[source].state
        if behind:
            lineage.before_write()
            log.warning("%s is filled with the weights of %s", labels[own], labels[source])
        optimizer.owners.fill(source)
        if behind:
            lineage.update(**msgspec.structs.asdict(histories[source].record))
    common = histories[source or 0]
    lineage.share(common.life, partners(common.record, [history.server_life for history in histories]))
    check_equal({name: local for name, (_, local) in served.mapped.tensors.items()}, replicas, labels)


def resume(config: Config, optimizer: Optimizer, lineage: LineageFile) -> None:
    """Load the optimizer state that belongs to the served weights: of this instance's last checkpoint, or of the checkpoint
    that the server was started from. Repair replicas that a killed trainer may have left different. Collective."""
    source = Path(lineage.record.checkpoint)
    wanted = lineage.record.checkpoint and config.checkpoint.resume
    if wanted and config.optim.reset_state:
        log.warning(
            "optim.reset_state=true: fresh optimizer state, as at every start while it is set, not that of %s", source
        )
    elif wanted and not optimizer_folder(source).is_dir():
        log.warning(
            "%s: got no such folder, expected the optimizer state of the served weights there or in %s; it starts afresh; "
            "to keep it, put the folder back and start the trainer again", source / OPTIMIZER_DIR, optimizer_folder(source),
        )  # fmt: skip
    elif wanted:
        from apollo_tp.checkpoint import optimizer_state

        optimizer_state.load(optimizer, optimizer_folder(source))
        info = read_info(source)
        log.info("optimizer state of %s (weight version %s) loaded", source, info.weight_version if info else "?")
    if lineage.record.step_count > optimizer.step_count or (config.optim.reset_state and lineage.trained_here):
        optimizer.use_rounding_stream(lineage.record.weight_version)  # updates are counted from an earlier one again
    if not config.optim.reset_state and lineage.record.step_count > optimizer.step_count:
        log.warning(
            "optimizer: got the state of its step %d, expected that of %d, after which the last trainer ended: moments are "
            "those of the last checkpoint, the schedule goes on", optimizer.step_count, lineage.record.step_count,
        )  # fmt: skip
        optimizer.step_count = lineage.record.step_count
    if lineage.trained_here and (names := optimizer.resync_replicas()):
        log.warning(
            "ranks held different bits of %s (a trainer was killed in a write); all now have the lowest's", names
        )


def prepare(bound: Bound) -> Ready:
    """Make the trainer, plan its memory, and try the GPU's products. Collective. Raises DeviceMemoryError or DeviceError, on
    all ranks, where a step would not fit or would be computed wrong."""
    config, device, lineage = bound.config, bound.mapped.device, bound.lineage
    gate = bound.gate
    pace = Pace(config.qos.pace, bound.model.module, bound.mesh.tp, device)
    trainer = Trainer(
        bound.model,
        bound.optimizer,
        bound.mesh.tp,
        mesh=bound.mesh,
        device=device,
        max_micro_batch_tokens=config.train.max_micro_batch_tokens,
        gradients=config.train.gradients,
        weight_version=lineage.record.weight_version,
        before_write=lambda: before_write(lineage, gate, pace),
        pace=pace,
    )
    how = (bound.optimizer.describe(), trainer.gradients.value, mps.describe(config.qos, device))
    log.info("optimizer: %s; gradients: %s; qos: %s", *how)
    memory = _plan_memory(bound, trainer)
    log.info("memory: %s", memory)
    _check_products(bound, trainer)
    return Ready(**vars(bound), trainer=trainer, memory=memory)


def before_write(lineage: LineageFile, gate: UpdateGate, pace: Pace) -> None:
    """What happens on each rank before its weights change, in this order: a record that finds no room stops the step, and
    the server is paused for as short as possible. Collective."""
    lineage.before_write()
    gate.before_write()
    if gate.pauses:
        pace.suspend()


def before_restore(lineage: LineageFile, gate: UpdateGate) -> None:
    """As ``before_write``, before all weights are replaced: half a write cannot be given up, so the pause may be long.
    Collective."""
    lineage.before_write()
    gate.before_write(RESTORE_PATIENCE)


def _update_gate(served: Served, mesh: Mesh, alarm: Alarm) -> UpdateGate:
    """The pause of running requests around updates; the first rank of each replica attaches to its server. Collective."""
    sync, lock = served.config.sync, None
    with served.control.agree():
        if mesh.tp.rank == 0 and needs_lock(sync):
            lock = Lock(served.folder, sync, served.lineage.record.weight_version, alarm)
            served.stack.callback(lock.close)
    return UpdateGate(sync.mode, mesh.world, served.mapped.device, lock)


def _plan_memory(bound: Bound, trainer: Trainer) -> str:
    """One line that says what the longest micro-batch will need, and whether steps are captured. Collective."""
    train = bound.config.train
    if trainer.device.type != "cuda":
        return "not planned on a CPU, where attention keeps its scores: their need depends on the lengths in each batch"
    reserve_peer_memory(trainer)
    with bound.control.agree():
        plan = plan_memory(trainer, CudaMeter(trainer.device), train.max_sequence_tokens)
    keep = plan.needed_with_graphs(keep=True) <= plan.available
    with_graphs = plan.needed_with_graphs(keep=keep)
    # a replayed pass runs no hooks, so that the sums over replicas would run after it and not beside it
    replays = train.cuda_graphs and trainer.mesh.replicas.size == 1 and with_graphs <= plan.available
    if replays:
        replays = trainer.record_passes(GraphCache(trainer.model, keep=keep))
    return plan.describe(with_graphs if replays else 0)


def _check_products(bound: Bound, trainer: Trainer) -> None:
    """Refuse a GPU that multiplies wrong, as some do under MPS."""
    if trainer.device.type != "cuda":
        return
    model = bound.model
    tensors = [*model.leaves, *(parameter.tensor for parameter in model.parameters)]  # joined, and their parts
    with bound.control.agree():
        check_products(tensors, trainer.max_micro_batch_tokens, bound.world.rank)
        torch.cuda.empty_cache()
