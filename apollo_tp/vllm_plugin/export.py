"""In each vLLM worker, after the model is loaded: share its memory, trace its loader, publish the manifest."""

from __future__ import annotations

import functools
import logging
import traceback
from typing import Any

import torch
from torch import nn

from apollo_tp.runtime import instance_folder
from apollo_tp.shards.manifest import Manifest, publish
from apollo_tp.vllm_plugin import chat, memory
from apollo_tp.vllm_plugin.compat import config, refusals, release
from apollo_tp.vllm_plugin.manifest_builder import build_manifest, checkpoint_tensors, manifest_header

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only


def on_loaded(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Export this worker's weights. A failure is logged and published; it never takes the server down."""
    try:
        _publish_weights(model, vllm_config, model_config)
    # The server must continue to serve, whatever is wrong with training it.
    except Exception:
        logger.exception("apollo_tp: could not export the weights; this server cannot be trained")


def _publish_weights(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    rank, size = config.tensor_parallel()
    header = manifest_header(vllm_config, rank, size)
    folder = instance_folder.instance_dir(header["instance_id"])
    try:
        manifest = _export(model, vllm_config, header)
    except Exception:
        publish(Manifest(**header, error=traceback.format_exc()), folder)  # so that the trainer can report the reason
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


def _export(model: nn.Module, vllm_config: Any, header: dict[str, Any]) -> Manifest:
    """The manifest of this worker, over shared memory. Raises RuntimeError if the server cannot be trained."""
    release.check_version()
    if reasons := refusals.refusals_of_server(vllm_config, model):
        raise RuntimeError("this server cannot be trained in place: " + "; ".join(reasons))
    share = functools.partial(memory.share, device=torch.device(header["device"]))
    return build_manifest(header, model, vllm_config.model_config, checkpoint_tensors(vllm_config, header), share)
