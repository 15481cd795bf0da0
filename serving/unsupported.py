"""What vLLM loads in place of a FlashSloth if FlashSloth was not tested with its version."""

from typing import Any

from torch import nn

from . import check_version, vllm_version


class UnsupportedVllm(nn.Module):
    """Refuses to be built, and names the versions that are supported."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        check_version(vllm_version())

    def forward(self, input_ids: Any, positions: Any) -> None:
        """Part of the interface by which vLLM recognises a model."""

    def embed_input_ids(self, input_ids: Any) -> None:
        """Part of the interface by which vLLM recognises a model."""

    def compute_logits(self, hidden_states: Any) -> None:
        """Part of the interface by which vLLM recognises a model."""
