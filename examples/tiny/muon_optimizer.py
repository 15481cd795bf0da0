"""Muon, momentum with orthogonalized updates, for the matrices of hidden layers; AdamW for all other parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon. Updates are scaled as in Liu et al., "Muon is scalable for LLM training",
2025, https://arxiv.org/abs/2502.16982, so that one learning rate and one weight decay suit all parameters.

`torch.optim.Muon` accepts only matrices, repeats all of its work in every process, and always computes in bfloat16,
which is many times slower on a CPU without bfloat16 instructions.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, so that small singular values grow quickly
NUM_ROUNDS = 5
STEP_LENGTH = 0.2  # root mean square of an AdamW update
NOT_HIDDEN = ("embed_tokens", "lm_head", "position_embedding", "query_tokens")


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a matrix to between 0.6 and 1.3 by Newton-Schulz iterations.

    Singular vectors stay the same.

    Args:
        matrix: `(rows, columns)`; singular values below a thousandth of its norm may end up below 0.6.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.mT if is_tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(NUM_ROUNDS):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), found, beta=linear)
    return found.mT if is_tall else found


class Muon(torch.optim.AdamW):
    """Muon for the matrices of a model's hidden layers, AdamW for its embeddings, vectors and convolutions.

    With several processes, each orthogonalizes its share of the matrices. All must have the same gradients, as with
    `DistributedDataParallel`.

    Args:
        model: The model to train; frozen parameters are skipped.
        lr: Learning rate of both.
        momentum: Muon's momentum.
        adamw: Learning rates of parts of the model that AdamW trains, by a regular expression for their names;
            the first one that fits counts.
        dtype: Type in which updates are orthogonalized: bfloat16 is three times faster on processors that have it.
        kwargs: Arguments of `torch.optim.AdamW`; `weight_decay` also applies to Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.95,
        adamw: Mapping[str, float] = MappingProxyType({}),
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        self.dtype = dtype
        matrices, others = [], []
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in adamw}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                is_hidden = weight.ndim == 2 and not any(part in name for part in NOT_HIDDEN)
                part = next((part for part in adamw if re.search(part, name)), None)
                (parts[part] if part else matrices if is_hidden else others).append(weight)
        groups = [{"params": matrices, "momentum": momentum}, {"params": others}]
        groups += [{"params": weights, "lr": adamw[part]} for part, weights in parts.items() if weights]
        super().__init__(groups, lr=lr, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """See `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self._step_matrices(groups[0])
        self.param_groups = groups[1:]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        rank, num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        weights = [weight for weight in group["params"] if weight.grad is not None]
        directions = []
        for place, weight in enumerate(weights):
            state = self.state[weight]
            if not state:  # AdamW's names, so that its `state_dict` methods save and load them
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
            state["step"] += 1
            state["exp_avg"].lerp_(weight.grad, 1 - group["momentum"])
            if place % num_processes == rank:
                step = weight.grad.lerp(state["exp_avg"], group["momentum"])  # Nesterov's
                directions.append(orthogonalize(step.to(self.dtype)).float())
            else:
                directions.append(torch.zeros_like(weight))
        if num_processes > 1:
            gathered = torch.cat([direction.flatten() for direction in directions])
            dist.all_reduce(gathered)
            parts = gathered.split([weight.numel() for weight in weights])
            directions = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        for weight, direction in zip(weights, directions, strict=True):
            length = STEP_LENGTH * max(weight.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"] * length)
