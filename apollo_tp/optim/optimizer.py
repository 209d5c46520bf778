"""APOLLO and AdamW over tensor-parallel shards: one step on every rank, agreed before anything is written.

With gradients that are kept until ``step`` (the default) a step that is skipped leaves no trace at all. After
``attach_in_backward`` a step may write matrices inside the backward pass and free their gradients at once; see there for
what that gives up. The arithmetic and its collectives are in ``update_group``, the hooks in ``in_backward``.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_tp.config import EmbeddingMode, OptimConfig, Precision, Schedule
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ApolloTpError, CollectiveError, ConfigError
from apollo_tp.optim.in_backward import InBackwardStep, by_leaf, names_of_complete_leaves
from apollo_tp.optim.late_weights import LateWeights
from apollo_tp.optim.owners import Owners, assign_owners, read_verdicts
from apollo_tp.optim.parameters import OptimParameter, Weight, in_memory_order
from apollo_tp.optim.replicas import check_replicas, resync_replicas
from apollo_tp.optim.sharding import Decision, moment_rank
from apollo_tp.optim.update_group import UpdateGroup, projects

COSINE_FLOOR = 0.1
"""A cosine schedule ends at this share of the learning rate, as in the APOLLO paper's recipe; a linear one at 0."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did; the same on every rank.

    ``skipped`` says why the step was stopped, and what was written before that: nothing, but for the first matrices of a
    step that updates in the backward pass; "" if it went through. ``grad_norm`` is the global norm before clipping, each
    replicated element counted once. ``num_updated`` counts the parameters that were written: one whose gradient is exactly
    zero is left alone. ``largest_update`` is the largest ‖ΔW‖ / ‖W‖ over the matrices (without weight decay).
    ``skipped_in_a_row`` counts this and the skipped steps directly before it.
    """

    skipped: str
    grad_norm: float
    learning_rate: float
    num_updated: int
    largest_update: float
    skipped_in_a_row: int


def learning_rate(config: OptimConfig, step_count: int) -> float:
    """The learning rate of the step after ``step_count`` completed ones, which are counted over all jobs (the count is part
    of the saved state); the end value holds after ``total_steps``."""
    warmup = min(1.0, (step_count + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule is Schedule.constant or step_count < config.warmup_steps:
        return config.lr * warmup
    assert config.total_steps is not None  # OptimConfig checks it
    progress = (step_count - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    if config.schedule is Schedule.linear:
        return config.lr * (1.0 - progress)
    return config.lr * (COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress)))


class Optimizer:
    """All trained parameters of this rank. All ranks pass the same names in the same order. One all-reduce.

    ``replicas`` are the ranks with the same shard, one in each of several replicas that are trained together (see
    ``owners``). ``update_group`` holds the parameters that this replica owns (all, if there is one replica) with their
    state, and ``weights`` are the same; ``names`` are of all. ``step_count`` counts completed steps over all jobs;
    ``rounding_stream`` is set by ``use_rounding_stream``. Both are saved with the state. ``in_backward`` is set by
    ``attach_in_backward``; with ``late_weights``, a step returns before its weights have reached other replicas. Raises
    ConfigError if there is nothing to train, a name occurs twice or a replica would own nothing, UnsupportedModelError for
    a dtype, shape or layout that cannot be written in place.
    """

    def __init__(
        self,
        config: OptimConfig,
        precision: Precision,
        parameters: Sequence[OptimParameter],
        tp: TPGroup,
        replicas: TPGroup | None = None,
    ) -> None:
        self.config, self.precision, self.tp = config, precision, tp
        self.replicas = replicas or TPGroup.single()
        frozen = config.embeddings is EmbeddingMode.frozen
        given = [p for p in parameters if not (frozen and p.role == "embedding")]
        trained = [in_memory_order(p) for p in given]
        self.names = [p.name for p in trained]
        if not trained or len(set(self.names)) < len(trained):
            raise ConfigError(
                f"parameters: got {len(trained)} to train with {len(set(self.names))} names, expected at least one and "
                "distinct names; a tied embedding and head are one parameter"
            )
        owner = assign_owners(trained, self.replicas.size)
        self.owners = Owners(trained, owner, self.replicas) if self.replicas.size > 1 else None
        self.owned = [i for i, replica in enumerate(owner) if replica == self.replicas.rank]
        self.projected_names = sorted(p.name for p in trained if projects(p, config))
        self.weights = [Weight(trained[i], precision, config.seed, tp) for i in self.owned]
        self.device = self.weights[0].data.device
        self._leaves = [p.tensor for p in given if p.tensor.requires_grad]
        self.update_group = UpdateGroup(self.weights, config, tp, replicas=self.replicas)
        self.step_count = self.skipped_in_a_row = self.rounding_stream = self._num_writes = 0
        self.in_backward: InBackwardStep | None = None
        self.late_weights: LateWeights | None = None
        self._doubtful = False
        self.measure_weights()

    # --- the step --------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Drop the gradients of all trained parameters that are leaves, and forget a step in the backward pass that did not
        end. Local."""
        for leaf in self._leaves:
            leaf.grad = None
        if self.in_backward is not None:
            self.in_backward.abandon()
        if self.owners is not None:
            self.owners.abandon()

    def begin_exchange(self) -> None:
        """The next backward pass is the last one before ``step``: with several replicas, gradients are summed beside it, as
        they become complete. Without this call, ``step`` does it. Local; the sums are collective (``Owners``)."""
        if self.owners is not None:
            self.owners.begin()

    def learning_rate(self, scale: float = 1.0) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.config, self.step_count) * scale

    def progress(self) -> tuple[int, int]:
        """Steps so far, and a checksum of the updates of all parameters, the same on all ranks. Which collectives come when
        follows from them. With several replicas, each of which counts the updates of what it owns, the second is how many
        decisions to write there were."""
        if self.owners is not None:
            return self.step_count, self._num_writes
        return self.step_count, zlib.crc32(array("q", self.update_group.counters.steps))

    def step(
        self, learning_rate_scale: float = 1.0, loss: Tensor | None = None, received: Tensor | None = None
    ) -> StepOutcome:
        """Update all weights in place from their local gradients, or none on any rank. After ``begin_step_in_backward``:
        what the backward pass has left.

        ``loss`` (0-d) is only tested: if it is not finite on some rank, no rank writes. ``received`` (fp32 [1]) is 1 if
        this rank has what completes its gradients from other ranks (``GradientSync.finish``). Collectives: if a matrix is
        cut along its contracted dimension, a reduce-scatter per bucket and one all-gather of channel scales; one
        all-reduce of 3 floats per parameter (with clipping, one of 1 and one of 2) and some canaries; now and then one
        all-reduce of weight norms (every ``refresh_every`` steps) and one all-gather of checksums (every
        ``check_replicas_every``).

        A rank writes only if every collective that its update follows from has happened, on it and on all ranks, as far as
        the last all-reduce tells: where a communicator was aborted, work that waits on the device finds a canary that is not
        right and leaves weights and moments alone, and this raises CollectiveError. If the last one itself happened on some
        ranks only, these write: their counts of updates then differ (``progress``), so that the ranks cannot go on together.
        Raises ReplicaError if replicas of a weight differ. On CUDA it returns while the device still writes, but for the
        steps of the last two collectives.
        """
        lr = self.learning_rate(learning_rate_scale)
        if self.in_backward is not None and self.in_backward.begun:
            decisions = self.in_backward.finish(lr, loss, received)
        else:
            self.catch_up()
            gradients, received = self._sum_over_replicas(received)
            update = self.update_group.update(lr, loss, received=received, gradients=gradients)
            decisions = [(self.update_group, update)]
        outcome = self._conclude(decisions, lr)
        self.step_count += not outcome.skipped
        if self.owners is not None and outcome.num_updated:
            self._publish(self.owners)  # after all ranks have counted: ``rejoin`` makes up for one that raises here
        if not outcome.skipped:
            if self.step_count % self.config.refresh_every == 0:
                self.measure_weights()
            if self.config.check_replicas_every and self.step_count % self.config.check_replicas_every == 0:
                check_replicas(self.weights, self.tp)
                if self.owners is not None:
                    self.await_weights()
                    self.owners.check_equal()
        return outcome

    def launch_late(self) -> None:
        """After a step with ``late_weights``: start the copy. Collective as ``Owners.publish``."""
        if self.late_weights is not None:
            self.late_weights.launch()

    def _publish(self, owners: Owners) -> None:
        if self.late_weights is not None:
            self.late_weights.announce()
        else:
            owners.publish()

    def await_weights(self) -> None:
        """Before weights are read or written by anything but a forward pass: let the current stream wait for those of other
        owners. The host does not wait. Local once ``launch_late`` was called."""
        if self.late_weights is not None:
            self.late_weights.wait()

    def _sum_over_replicas(self, received: Tensor | None) -> tuple[list[Tensor] | None, Tensor | None]:
        """The gradients [R, C] of what this replica owns, summed over replicas, and ``received`` (fp32 [1]), 0 if a sum did
        not happen. Collective as ``Owners.sum_gradients``."""
        if self.owners is None:
            return None, received
        without_gradient, arrived = self.owners.sum_gradients()
        gradients = [
            without_gradient[i].view(weight.local_2d) if i in without_gradient else weight.gradient()
            for i, weight in zip(self.owned, self.weights, strict=True)
        ]
        return gradients, arrived if received is None else arrived * received

    def rejoin(self) -> None:
        """On all ranks, once one has raised: only some may have measured the weights, or copied those of other owners. The
        next step does both (``catch_up``)."""
        self._doubtful = True
        if self.late_weights is not None:
            self.late_weights.forget()

    @property
    def is_behind(self) -> bool:
        """Whether ``catch_up`` will copy weights into served memory: after ``rejoin``, with several replicas."""
        return self._doubtful and self.owners is not None

    def catch_up(self) -> None:
        """What ``rejoin`` left to do, if anything. Collective, as ``Owners.publish`` and one all-reduce."""
        if self.is_behind and self.owners is not None:
            self.await_weights()
            self.owners.publish()
        if self._doubtful:
            self.measure_weights()

    def resync_replicas(self) -> list[str]:
        """See replicas.resync_replicas: before the first step of a trainer whose predecessor may have been killed. Then all
        replicas copy the owners' weights."""
        names = resync_replicas(self.weights, self.tp, self.replicas)
        if self.owners is not None:
            self.owners.publish()
        return names

    def _conclude(self, decisions: list[tuple[UpdateGroup, Decision]], lr: float) -> StepOutcome:
        """Count what is written, and say what stopped the rest. Waits for the decisions, not for the writes. Raises
        CollectiveError if a sum or gather did not happen."""
        square, num_updated, largest, skipped = 0.0, 0, 0.0, ""
        for group, decision in decisions:
            report, written = decision.read_report(), decision.written()
            group.accept(written)  # first: to say why needs a collective, which may raise
            relative = report[3 + len(written) : 3 + 2 * len(written)]
            verdicts = read_verdicts(report, len(written), group.replicas.size)
            if not all(verdict.checked for verdict in verdicts):
                raise self._nothing_received(num_updated)
            square += sum(verdict.square for verdict in verdicts)
            num_updated += sum(verdict.num_written for verdict in verdicts)
            largest = max(largest, *(verdict.largest for verdict in verdicts))
            why = self._why_skipped(group, decision, bool(report[1]), relative, lr)
            if not all(verdict.good for verdict in verdicts):
                why = self._why_any_skipped(why)
                num_updated = sum(written)
            skipped = skipped or why
        self._num_writes += num_updated > 0
        if skipped:
            self.skipped_in_a_row, largest = self.skipped_in_a_row + 1, 0.0
            skipped += f"; {num_updated or 'nothing'} {'tensors were' if num_updated else 'was'} written"
        else:
            self.skipped_in_a_row = 0
        return StepOutcome(skipped, math.sqrt(square), lr, num_updated, largest, self.skipped_in_a_row)

    def _nothing_received(self, num_updated: int) -> CollectiveError:
        return CollectiveError(
            f"optimizer step on rank {self.tp.rank}: got a sum or gather over ranks that did not happen, expected all "
            f"{self.tp.size} ranks in each; {num_updated or 'no'} tensors were written before it and nothing after. Another "
            "rank raised or ended: see its log"
        )

    def _why_any_skipped(self, why: str) -> str:
        """The reasons of all replicas, the same on all. One all-gather over replicas, if there are several."""
        reasons = ComputeControl(self.replicas, self.device).gather(why.encode())
        if len(reasons) == 1:
            return why
        return "; ".join(f"replica {r}: {text.decode()}" for r, text in enumerate(reasons) if text)

    def _why_skipped(
        self, group: UpdateGroup, decision: Decision, finite: bool, relative: list[float], lr: float
    ) -> str:
        """The reason, or "". One all-gather of flags if a value is not finite."""
        if not finite:
            flags = self.tp.all_gather((~torch.isfinite(decision.local_squares)).to(torch.int32)).view(self.tp.size, -1)
            what = [*(f"gradient of {weight.name}" for weight in group.weights), "loss"]
            found = [f"{what[i]} on rank {rank}" for rank, i in flags.nonzero().tolist()]
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return f"not finite: {', '.join(found[:3]) or 'a sum over ranks'}{more}"
        largest, limit = max(range(len(relative)), key=relative.__getitem__), self.config.max_relative_update
        if relative[largest] <= limit:
            return ""
        return (
            f"{group.weights[largest].name}: learning rate {lr:g} would move it by "
            f"{relative[largest]:.3g} of its norm in one step, more than optim.max_relative_update={limit:g}; lower optim.lr"
        )

    def measure_weights(self) -> None:
        """Norms of all matrices, global, replicas once; infinite where no limit applies. At the start, now and then, and
        when weights were replaced. One all-reduce, which is waited for."""
        squares = self.tp.sum_checked(self.update_group.local_square_norms(), "norms of the weights")
        self._doubtful = False
        norms = torch.where(squares > 0, squares.double().sqrt(), torch.inf)
        self.update_group.counters.weight_norms.copy_(norms)

    # --- updates inside the backward pass --------------------------------------------------------------------------

    def attach_in_backward(self) -> list[str]:
        """Allow steps that update matrices in the backward pass as soon as their gradients are complete, and free them.

        Returns the names that are updated so. Such a step is ``begin_step_in_backward(...)``, one ``backward()``,
        ``step(...)``; without the first call a step is a stored one as before, and steps of both kinds may follow each
        other. Parameters whose gradient must still be summed over replicas, those of AdamW, and what shares a leaf with
        them, keep their gradients until ``step``. All ranks must compute gradients of the same leaves in the same order.
        Updates are the same as with stored gradients, with these limits: no accumulation over several backward passes; no
        clipping (the norm of the whole gradient is not known before the first write; the norm-growth limiter works); a
        value that is not finite stops the bucket of matrices where it appears (in_backward.BUCKET_BYTES) and all later
        ones, while those already written stay written. Collectives per bucket: one all-reduce of 3 floats per matrix and,
        if one is cut along its contracted dimension, one reduce-scatter and one all-gather. Collective itself: one
        all-reduce. Raises ConfigError if clipping is on.
        """
        if self.config.max_grad_norm is not None:
            raise ConfigError(
                f"optim.max_grad_norm: got {self.config.max_grad_norm}, expected null with train.gradients=in_backward, "
                "since the norm of the whole gradient is not known before the first matrix is written"
            )
        if self.owners is not None:
            raise ConfigError(
                f"train.gradients: got in_backward with {self.replicas.size} replicas, expected stored, since gradients are "
                "summed over replicas before the first matrix is written"
            )
        if self.in_backward is None:
            matrices = [matrix.weight for matrix in self.update_group.matrices.values()]
            names = names_of_complete_leaves(matrices)
            here = torch.tensor([float(w.name in names) for w in matrices], device=self.device)
            ranks = self.tp.sum_checked(here, "what may be updated in the backward pass").tolist()
            # hooks are collective: all ranks, or none
            everywhere = [
                weight for weight, num_ranks in zip(matrices, ranks, strict=True) if num_ranks == self.tp.size
            ]
            names = names_of_complete_leaves(everywhere)
            if len(names) == len(self.weights):  # ``step`` needs a parameter to tell what happened
                names -= {weight.name for weight in by_leaf(everywhere)[-1][1]}
            chosen = [weight for weight in everywhere if weight.name in names]
            self.in_backward = InBackwardStep(self.update_group, chosen)
        return self.in_backward.names

    def begin_step_in_backward(self, learning_rate_scale: float = 1.0, loss: Tensor | None = None) -> None:
        """Before the backward pass of a step: its learning rate, and its loss to test. One all-reduce of two floats."""
        if self.in_backward is None:
            raise ApolloTpError(
                "begin_step_in_backward: got an optimizer with stored gradients; call attach_in_backward first"
            )
        self.catch_up()
        self.in_backward.begin(self.learning_rate(learning_rate_scale), loss)

    # --- state -----------------------------------------------------------------------------------------------------

    def use_rounding_stream(self, number: int) -> None:
        """Take random bits for stochastic rounding from this stream from the next step on: a number that is the same on all
        ranks and, where updates are counted from an earlier one again, has not been used for these weights. Local."""
        self.rounding_stream = number
        for weight in self.weights:
            weight.set_rounding_stream(number)

    def gather_counters(self) -> tuple[list[int], list[float]]:
        """Updates so far, and norms of the limiter, of all ``names``. Collective over replicas, if there are several: one
        all-gather."""
        own = self.update_group.counters
        if self.owners is None:
            return own.steps, own.limiter_norms.tolist()
        mine = torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.device)
        mine[self.owned] = torch.stack([self.update_group.vector(own.steps), own.limiter_norms], dim=1)
        steps, norms = self.replicas.gather_checked(mine, "counters of the replicas").sum(0).unbind(1)
        return [int(count) for count in steps.tolist()], norms.tolist()

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: moments and int8 remainders."""
        group = self.update_group
        moments = sum(g.exp_avg.nbytes + g.exp_avg_sq.nbytes for g in group.groups)
        moments += sum(g.exp_avg.nbytes + g.exp_avg_sq.nbytes for g in group.adamw.values())
        return moments + sum(w.remainder.nbytes for w in self.weights if w.remainder is not None)

    def describe(self) -> str:
        """One line for status pages and logs."""
        matrices = self.update_group.matrices.values()
        exchanged = sum(m.exchanged for m in matrices)
        rank = f", rank {moment_rank(self.config)}" if matrices else ""
        early = (
            "" if self.in_backward is None else f", {len(self.in_backward.names)} may be updated in the backward pass"
        )
        return (
            f"{self.config.kind.value}{rank}, scale {self.config.scale}, {self.precision.value}: {len(matrices)} matrices "
            f"projected ({exchanged} exchanged between {self.tp.size} ranks{early}), "
            f"{len(self.weights) - len(matrices)} tensors by AdamW, {self.state_bytes() / 1e9:.3g} GB of state on rank "
            f"{self.tp.rank}{f' of replica {self.replicas.rank} of {self.replicas.size}' if self.owners else ''}"
        )
