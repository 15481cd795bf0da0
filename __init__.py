"""FlashSloth for transformers: a small, fast vision-language model.

Importing the package registers its classes with transformers' auto classes, so `trust_remote_code` is not needed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers' own needs torchvision

from .configuration_flashsloth import FlashSlothConfig
from .image_processing_flashsloth import FlashSlothImageProcessor
from .modeling_flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothPreTrainedModel
from .processing_flashsloth import FlashSlothProcessor
from .video_processing_flashsloth import video_frames

__version__ = "0.1.0"

AutoConfig.register(FlashSlothConfig.model_type, FlashSlothConfig, exist_ok=True)
AutoModel.register(FlashSlothConfig, FlashSlothModel, exist_ok=True)
AutoProcessor.register(FlashSlothConfig, FlashSlothProcessor, exist_ok=True)
AutoImageProcessor.register(FlashSlothConfig, FlashSlothImageProcessor, exist_ok=True)
for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM):
    auto_class.register(FlashSlothConfig, FlashSlothForConditionalGeneration, exist_ok=True)

# A class with an auto class saves its code next to the weights, so that the folder loads without the package.
FlashSlothConfig.register_for_auto_class()
FlashSlothModel.register_for_auto_class("AutoModel")
FlashSlothForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
FlashSlothImageProcessor.register_for_auto_class("AutoImageProcessor")
FlashSlothProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "FlashSlothConfig",
    "FlashSlothForConditionalGeneration",
    "FlashSlothImageProcessor",
    "FlashSlothModel",
    "FlashSlothPreTrainedModel",
    "FlashSlothProcessor",
    "video_frames",
]
