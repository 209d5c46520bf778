"""In each vLLM worker, once the model is loaded: share its memory, trace its loader, publish the manifest."""

from __future__ import annotations

import bisect
import logging
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import ENDPOINTS_VARIABLE
from apollo_tp.shards.manifest import (
    SCHEMA_VERSION,
    Allocation,
    CheckpointTensor,
    Manifest,
    Refusal,
    SegmentRecord,
    ServedTensor,
    publish,
)
from apollo_tp.shards.mapping import DTYPES, NAMES
from apollo_tp.vllm_plugin import chat, checkpoint_index, memory
from apollo_tp.vllm_plugin.compat import versions as compat
from apollo_tp.vllm_plugin.copies import second_copies
from apollo_tp.vllm_plugin.trace import Trace, trace_loader

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only


def on_loaded(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Export this worker's weights. A failure is logged and published; it never takes the server down."""
    try:
        _publish_weights(model, vllm_config, model_config)
    # The server must go on serving whatever is wrong with training it.
    except Exception:
        logger.exception("apollo_tp: could not export the weights; this server cannot be trained")


def _publish_weights(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    rank, size = compat.tensor_parallel()
    header = _header(vllm_config, model_config, rank, size)
    folder = instance_folder.instance_dir(header["instance_id"])
    try:
        compat.check_version()
        manifest = _export(model, vllm_config, model_config, header)
    except Exception:
        publish(Manifest(**header, error=traceback.format_exc()), folder)  # so that the trainer can say why
        raise
    if rank == 0 and not manifest.endpoints:
        chat.publish_of_engine(model_config, folder)  # before the manifest, for which a trainer waits
    path = publish(manifest, folder)
    logger.info(
        "apollo_tp: rank %d of %d exported %d parameters as %d segments of %d checkpoint tensors (%d refused) to %s",
        rank, size, len(manifest.served), len(manifest.segments), len(manifest.checkpoint), len(manifest.refusals), path,
    )  # fmt: skip
    for copy, original in manifest.copies.items():
        logger.info("apollo_tp: %s is a second copy of %s: checkpoints have the trained values of it", copy, original)
    for refusal in manifest.refusals:
        logger.warning("apollo_tp: rank %d: %s cannot be trained in place: %s", rank, refusal.name, refusal.reason)


def _header(vllm_config: Any, model_config: Any, rank: int, size: int) -> dict[str, Any]:
    process = processes.ProcessId.of(os.getpid())
    assert process is not None
    device = "cuda" if torch.device(vllm_config.device_config.device).type == "cuda" else "cpu"
    folder = checkpoint_index.model_folder(
        model_config.model, model_config.revision, vllm_config.load_config.download_dir
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "instance_id": instance_folder.ensure_instance_id(),
        "created_at": time.time(),
        "vllm_version": compat.vllm_version(),
        "model_path": str(folder or model_config.model),
        "endpoints": bool(os.environ.get(ENDPOINTS_VARIABLE)),
        "served_model_names": compat.served_model_names(model_config),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "tp_rank": rank,
        "tp_size": size,
        "host": socket.gethostname(),
        "pid": process.pid,
        "pid_start_ticks": process.start_ticks,
        "pid_namespace": processes.pid_namespace(),
        "device": device,
        "device_uuid": str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        if device == "cuda"
        else "",
        "max_model_len": model_config.max_model_len,
        "config_overrides": compat.config_overrides(model_config),
    }


def _export(model: nn.Module, vllm_config: Any, model_config: Any, header: dict[str, Any]) -> Manifest:
    reasons = compat.refusals_of_server(vllm_config, model)
    if reasons:
        raise RuntimeError("this server cannot be trained in place: " + "; ".join(reasons))
    started = time.perf_counter()
    checkpoint = _checkpoint_tensors(model_config, vllm_config, header)
    unique, names = _unique_parameters(model)
    device = torch.device("cuda") if header["device"] == "cuda" else torch.device("cpu")
    allocations = memory.share(unique, device)
    served = _served_tensors(unique, names, allocations)
    shared_at = time.perf_counter()
    traces = trace_loader(model, [(t.name, tuple(t.shape), DTYPES[t.dtype]) for t in checkpoint])
    done = time.perf_counter()
    return Manifest(
        **header,
        trace_seconds=done - shared_at,
        publish_seconds=shared_at - started,
        allocations=[allocation for _, allocation in allocations],
        served=served,
        checkpoint=checkpoint,
        **contents(traces, checkpoint, model, model_config, unique, served, header),
    )


def contents(
    traces: list[Trace],
    checkpoint: list[CheckpointTensor],
    model: nn.Module,
    model_config: Any,
    parameters: list[nn.Parameter],
    served: list[ServedTensor],
    header: dict[str, Any],
) -> dict[str, Any]:
    """The fields of a manifest that say what became of each checkpoint tensor."""
    segments, refusals = segments_of(traces, parameters, served)
    not_served = [t.name for t in traces if not t.served and not t.refusal]
    copies: dict[str, str] = {}
    if header["tp_rank"] == 0:
        ids = compat.embedding_parameters(model)
        holders = [tensor for parameter, tensor in zip(parameters, served, strict=True) if id(parameter) in ids]
        names = {tensor.name for tensor in holders}
        embeddings = {s.checkpoint for s in segments if s.served in names}
        tied = compat.ties_embeddings(model_config) or any(tensor.aliases for tensor in holders)
        copies, unclear = second_copies(Path(header["model_path"]), checkpoint, not_served, embeddings, tied=tied)
        refusals += unclear
    return {"segments": segments, "refusals": refusals, "not_served": not_served, "copies": copies}


def _checkpoint_tensors(model_config: Any, vllm_config: Any, header: dict[str, Any]) -> list[CheckpointTensor]:
    folder, load_format = Path(header["model_path"]), compat.load_format(vllm_config)
    found = checkpoint_index.read_index(folder, load_format) if folder.is_dir() else []
    if found:
        return found
    if load_format != "dummy":
        raise RuntimeError(
            f"{model_config.model}: got no *.safetensors, expected a safetensors checkpoint; convert it with "
            "model.save_pretrained(folder)"
        )
    safetensors_name = NAMES[model_config.dtype]
    return checkpoint_index.index_from_config(model_config.hf_config, safetensors_name)


def _unique_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[list[str]]]:
    """Distinct parameters in order, and all names of each (tied weights have several)."""
    index: dict[int, int] = {}
    unique: list[nn.Parameter] = []
    names: list[list[str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in index:
            index[id(parameter)] = len(unique)
            unique.append(parameter)
            names.append([])
        names[index[id(parameter)]].append(name)
    return unique, names


def _served_tensors(
    parameters: list[nn.Parameter], names: list[list[str]], allocations: list[tuple[int, Allocation]]
) -> list[ServedTensor]:
    bases = [base for base, _ in allocations]
    served = []
    for parameter, its_names in zip(parameters, names, strict=True):
        index = bisect.bisect_right(bases, parameter.data_ptr()) - 1
        served.append(
            ServedTensor(
                name=its_names[0],
                allocation=index,
                offset_bytes=parameter.data_ptr() - bases[index],
                shape=list(parameter.shape),
                stride=list(parameter.stride()),
                dtype=str(parameter.dtype).removeprefix("torch."),
                aliases=its_names[1:],
            )
        )
    return served


def segments_of(
    traces: list[Trace], parameters: list[nn.Parameter], served: list[ServedTensor]
) -> tuple[list[SegmentRecord], list[Refusal]]:
    """Turn recorded copies into segments of served tensors; copies that went elsewhere become refusals."""
    order = sorted(range(len(parameters)), key=lambda i: parameters[i].data_ptr())
    starts = [parameters[i].data_ptr() for i in order]
    segments, refusals = [], []
    for trace in traces:
        if trace.refusal:
            refusals.append(Refusal(name=trace.name, reason=trace.refusal))
            continue
        for copy in trace.copies:
            index = (
                order[bisect.bisect_right(starts, copy.address) - 1] if starts and copy.address >= starts[0] else None
            )
            parameter = parameters[index] if index is not None else None
            if parameter is None or copy.address >= parameter.data_ptr() + parameter.nbytes:
                reason = "vLLM's loader copies it into a temporary tensor, not into a parameter"
                refusals.append(Refusal(name=trace.name, reason=reason))
                segments = [s for s in segments if s.checkpoint != trace.name]
                break
            segments.append(
                SegmentRecord(
                    checkpoint=trace.name,
                    box_offset=list(copy.box.offset),
                    box_shape=list(copy.box.shape),
                    served=served[index].name,  # type: ignore[index]
                    view_offset=(copy.address - parameter.data_ptr()) // parameter.element_size(),
                    view_stride=list(copy.stride),
                )
            )
    return segments, refusals
