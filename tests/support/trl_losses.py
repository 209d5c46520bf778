"""TRL's own losses on small tensors, as numbers for our tests: its code runs, its trainers are not built.

TRL is not part of the lock file. To make ``trl_losses.json`` again, put it and what it imports into a folder of its own:

    pip install --no-deps --target DIR trl==1.16.0 datasets pandas pyarrow multiprocess dill xxhash python-dateutil pytz six
    PYTHONPATH=.:DIR python -m tests.support.trl_losses
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_suffix(".json")
LENGTHS, WIDTH = (6, 3, 5, 4), 6
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "ppo", "loss_config": {"clip_low": 0.2, "clip_high": 0.28, "normalisation": "sequence_mean"}},
    "bnpo": {"loss": "ppo", "loss_config": {"clip_low": 0.2, "clip_high": 0.28}},
    "dr_grpo": {
        "loss": "ppo",
        "loss_config": {"clip_low": 0.2, "clip_high": 0.28, "normalisation": "constant", "divisor": 4 * 16},
    },
    "grpo with k3": {
        "loss": "ppo",
        "loss_config": {"clip_low": 0.2, "clip_high": 0.28, "normalisation": "sequence_mean", "kl_coef": 0.3},
    },
    "gspo": {"loss": "gspo", "loss_config": {"clip_low": 0.03, "clip_high": 0.04}},
    "cispo": {"loss": "cispo", "loss_config": {"clip_low": 1.0, "clip_high": 0.2}},
    "kto": {"loss": "kto", "loss_config": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}},
}


def inputs() -> dict[str, list[Any]]:
    """Log-probabilities [4][6] under the trained and the sampling weights and a reference, and an advantage of each
    sequence; sequences have 6, 3, 5 and 4 tokens."""
    draw = random.Random(7)
    old = [[draw.uniform(-3, -0.1) for _ in range(WIDTH)] for _ in LENGTHS]
    near = [[[x + draw.gauss(0, 0.3) for x in row] for row in old] for _ in range(2)]
    return {"old": old, "new": near[0], "reference": near[1], "advantages": [1.3, -0.7, 0.4, -1.0]}


def _accelerator() -> SimpleNamespace:
    same = lambda value, **_: value  # noqa: E731
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=same, gather_for_metrics=same, reduce=same,
        sync_gradients=True,
    )  # fmt: skip


def _mask() -> Tensor:
    return torch.tensor([[float(position < length) for position in range(WIDTH)] for length in LENGTHS])


def _common(**options: Any) -> SimpleNamespace:
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        _metrics=metrics,
        **options,
    )


def _grpo(name: str, config: dict[str, Any], new: Tensor, given: dict[str, Tensor]) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    kind = {"gspo": "grpo", "grpo with k3": "grpo"}.get(name, name)
    high = config["clip_high"] + (name == "cispo")  # of cispo, TRL's is the bound itself
    trainer = _common(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), loss_type=kind, epsilon_low=config["clip_low"],
        epsilon_high=high, beta=config.get("kl_coef", 0.0), max_completion_length=16, use_vllm=False,
        importance_sampling_level="sequence" if name == "gspo" else "token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    trainer.args.steps_per_generation = 1
    ids = torch.zeros(new.shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": _mask(),
        "advantages": given["advantages"], "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"], "num_items_in_batch": _mask().sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, batch)


def _kto(config: dict[str, Any], new: Tensor, given: dict[str, Tensor]) -> Tensor:
    from trl.trainer.kto_trainer import KTOTrainer

    logps = new * _mask()
    reference = (given["reference"] * _mask()).sum(-1)
    trainer = _common(
        _compute_kl_logps=lambda *_: logps.sum(-1), precompute_ref_logps=True, calculate_KL=True, loss_type="kto",
        beta=config["beta"], desirable_weight=config["desirable_weight"], _tp_size=1, _total_train_tokens=0,
        undesirable_weight=config["undesirable_weight"],
    )  # fmt: skip
    ones = torch.ones(len(LENGTHS), 1, dtype=torch.long)
    batch = {
        "input_ids": torch.cat([ones, _mask().long()], 1), "attention_mask": torch.cat([ones, _mask().long()], 1),
        "completion_mask": torch.cat([0 * ones, _mask().long()], 1), "label": given["advantages"] > 0,
        "ref_logps": reference, "ref_KL_logps": reference,
    }  # fmt: skip
    outputs = SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps))
    return KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)


def main() -> None:
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs().items()}
    results = {}
    for name, case in CASES.items():
        new = given["new"].clone().requires_grad_()
        config = case["loss_config"]
        loss = _kto(config, new, given) if name == "kto" else _grpo(name, config, new, given)
        loss.backward()
        assert new.grad is not None
        results[name] = {"loss": loss.item(), "gradient": new.grad.tolist()}
    PATH.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
