"""From the images of a request to tiles, with FlashSloth's own image processor, in vLLM's frontend."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from flashsloth import FlashSlothConfig, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import NUM_HD_TILES


class UnchangedImages(MultiModalDataParser):
    """Passes images on as they are; vLLM would put transparent ones on white and clip those with 16 bits."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        if data is None:
            return None
        is_batch = isinstance(data, (list, tuple)) or getattr(data, "ndim", 0) == 4
        return ImageProcessorItems(list(data) if is_batch else [data])


class FlashSlothProcessingInfo(BaseProcessingInfo):
    """Counts and limits of images."""

    @cached_property
    def processor(self) -> FlashSlothProcessor:
        """The checkpoint's processor."""
        config = self.ctx.model_config
        return FlashSlothProcessor.from_pretrained(config.model, revision=config.revision)

    def get_hf_config(self) -> FlashSlothConfig:
        """Config of the model."""
        return self.ctx.get_hf_config(FlashSlothConfig)

    def get_hf_processor(self, **kwargs: object) -> FlashSlothProcessor:
        """The checkpoint's processor; `kwargs` are given to its image processor with each image."""
        return self.processor

    def get_data_parser(self) -> MultiModalDataParser:
        """What reads the images of a request."""
        return UnchangedImages()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, and nothing else."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Image tokens of an image cut into five tiles, which a request may ask for."""
        return {"image": NUM_HD_TILES * self.get_hf_config().image_seq_length}

    def images_kwargs(self, mm_processor_kwargs: Mapping[str, object]) -> dict[str, Any]:
        """Arguments of the image processor: those of the server, replaced by those of a request.

        Raises:
            VLLMValidationError: If the request passes others.
        """
        merged = dict(self.ctx.get_merged_mm_kwargs(mm_processor_kwargs))
        scoped = merged.pop("images_kwargs", None) or {}
        merged |= dict(scoped)
        if unknown := sorted(set(merged) - {"do_image_splitting"}):
            raise VLLMValidationError(
                f"FlashSloth takes `do_image_splitting` in `mm_processor_kwargs`, but found {', '.join(unknown)}; "
                "remove it."
            )
        return merged

    def num_tiles(self, mm_processor_kwargs: Mapping[str, object]) -> int:
        """Tiles of each image of a request with these arguments."""
        return self.processor.image_processor.get_number_of_image_patches(0, 0, self.images_kwargs(mm_processor_kwargs))


class FlashSlothDummyInputs(BaseDummyInputsBuilder[FlashSlothProcessingInfo]):
    """What vLLM encodes to measure memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt with the placeholders of some images."""
        return self.info.processor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        """Some images of the size of a tile."""
        height, width = self.info.get_hf_config().tile_size
        return {"image": [Image.new("RGB", (width, height))] * mm_counts.get("image", 0)}


class FlashSlothImages(BaseMultiModalProcessor[FlashSlothProcessingInfo]):
    """Turns the images of a request into tiles, and their placeholders into image tokens."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The largest inputs: images cut into five tiles."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {"do_image_splitting": True}
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        images = list(hf_data["images"])
        try:
            features = self.info.processor.image_processor(
                images, return_tensors="pt", **self.info.images_kwargs(hf_kwargs)
            )
        except (TypeError, ValueError) as error:
            raise VLLMValidationError(str(error)) from error
        pixel_values = features["pixel_values"].to(self.info.ctx.model_config.dtype)
        num_tiles = torch.full((len(images),), self.info.num_tiles(hf_kwargs))
        return BatchFeature({"pixel_values": pixel_values, "num_tiles": num_tiles})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        tokens = [config.image_token_id] * (self.info.num_tiles(hf_processor_mm_kwargs) * config.image_seq_length)
        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=tokens)]
