"""What training must know of FlashSloth: recomputed activations, sharded parameters, batches without an image."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

SHARDED_CLASS_PREFIX = "FSDP"  # PyTorch's `fully_shard` gives a model a class of this name, derived from its own


class FlashSlothTrainingMixin(PreTrainedModel):
    """Training, sharding and saving, common to all FlashSloth models."""

    supports_gradient_checkpointing = True
    # Whole modules that are sharded or placed on a device as one, beside the layers of tower and decoder.
    _no_split_modules = ["SpatialAttentionPooling", "EmbeddedQuery"]

    def post_init(self) -> None:
        """Finish the constructor; see `PreTrainedModel.post_init`.

        Tower and decoder name all classes of their families that must not be split; accelerate's FSDP refuses a name
        that it does not find.
        """
        super().post_init()
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass; always non-re-entrant.

        The newer `activation_checkpointing_enable` leads here as well; peft, TRL and transformers 5.17 use this name.

        Args:
            gradient_checkpointing_kwargs: Arguments for `torch.utils.checkpoint.checkpoint`.
            **kwargs: What else transformers takes, such as `every_n_layers`.

        Raises:
            ValueError: If `use_reentrant=True` is asked for.
        """
        checkpointing_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if checkpointing_kwargs["use_reentrant"]:
            raise ValueError(
                "FlashSloth needs `use_reentrant=False`: re-entrant checkpointing loses the gradients of the image "
                "features, which reach a decoder layer by keyword. Leave the argument out, or set it to False."
            )
        # Where there is a newer name, the base class's method of this one warns of its end.
        enable = getattr(super(), "_activation_checkpointing_enable", super().gradient_checkpointing_enable)
        enable(checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        getattr(super(), "_activation_checkpointing_disable", super().gradient_checkpointing_disable)()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; see `torch.nn.Module.load_state_dict`.

        A tied weight may be missing, as `save_pretrained` leaves it out: it is its source.
        """
        tied = getattr(self, "all_tied_weights_keys", {}).items()
        missing = {copy: state_dict[source] for copy, source in tied if copy not in state_dict and source in state_dict}
        return super().load_state_dict({**state_dict, **missing} if missing else state_dict, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights, config and code; see `PreTrainedModel.save_pretrained`.

        A model that PyTorch's `fully_shard` (FSDP2) made bears another class while it lives; what is saved names
        FlashSloth's own class and brings its code, so that it loads anywhere.
        """
        sharded = type(self)
        own = next(base for base in sharded.__mro__ if not base.__name__.startswith(SHARDED_CLASS_PREFIX))
        names = {name: getattr(sharded, name) for name in ("__module__", "__name__")}
        try:
            for name in names:
                setattr(sharded, name, getattr(own, name))
            super().save_pretrained(*args, **kwargs)
        finally:
            for name, value in names.items():
                setattr(sharded, name, value)

    def touches_every_module(self) -> bool:
        """Whether a batch without an image must run the vision tower and all that follows it nevertheless.

        In training, so that every trained parameter has a gradient in every process: without one, two processes wait
        for each other for ever. And wherever parameters are gathered from other processes, in evaluation too.
        """
        if (self.training and torch.is_grad_enabled()) or is_deepspeed_zero3_enabled():
            return True
        return any(type(module).__name__.startswith(SHARDED_CLASS_PREFIX) for module in self.modules())
