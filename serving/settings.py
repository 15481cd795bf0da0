"""Checks the settings of `vllm serve` before anything is loaded, and adapts some of them to FlashSloth."""

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from flashsloth import FlashSlothConfig
from flashsloth.configuration_flashsloth import original_generation_config

from . import MODE


class FlashSlothSettings(VerifyAndUpdateConfig):
    """Called by vLLM with its settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check and adapt the settings of the model.

        Args:
            model_config: Settings of the model; a config in the layout of the original releases is replaced by its
                translation.

        Raises:
            ValueError: If something is set that FlashSloth does not support.
        """
        generation = model_config.try_get_generation_config()
        if not isinstance(model_config.hf_config, FlashSlothConfig):
            _translate(model_config)
            translated = original_generation_config(generation, model_config.hf_config)
            generation = {"do_sample": False} | translated.to_diff_dict()
        _refuse(_unsupported_model_settings(model_config))
        _check_decoder(model_config.hf_config)
        model_config.tokenizer_mode = MODE
        # Images keep their mode: FlashSloth's image processor reads all modes, as the original does.
        io_kwargs = model_config.multimodal_config.media_io_kwargs
        io_kwargs["image"] = {"image_mode": None} | io_kwargs.get("image", {})
        # `generate` and `transformers serve` are greedy unless the checkpoint or the caller says otherwise.
        if model_config.generation_config != "vllm" and not generation.get("do_sample"):
            model_config.override_generation_config = {
                "temperature": 0.0,
                **model_config.override_generation_config,
            }

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the settings of the engine.

        Raises:
            ValueError: If something is set that FlashSloth does not support.
        """
        _refuse(_unsupported_engine_settings(vllm_config))


def _refuse(names: Iterator[str]) -> None:
    if found := list(names):
        raise ValueError(
            f"FlashSloth in vLLM was not tested with {', '.join(found)} and would perhaps answer wrongly; remove the "
            "option, or serve the model with `transformers serve`."
        )


def _unsupported_model_settings(config: ModelConfig) -> Iterator[str]:
    multimodal = config.multimodal_config
    settings = {
        "--runner pooling": config.runner_type != "generate",
        f"--tokenizer-mode {config.tokenizer_mode}": config.tokenizer_mode not in ("auto", "hf", MODE),
        "--skip-tokenizer-init": config.skip_tokenizer_init,
        f"--quantization {config.quantization}": config.quantization is not None,
        "--enable-prompt-embeds": config.enable_prompt_embeds,
        "--enable-mm-embeds": multimodal.enable_mm_embeds,
        "--mm-encoder-only": multimodal.mm_encoder_only,
        "--limit-mm-per-prompt with 0 images": multimodal.get_limit_per_prompt("image") == 0,
        "--enable-sleep-mode": config.enable_sleep_mode,
    }
    yield from (name for name, is_set in settings.items() if is_set)


def _unsupported_engine_settings(config: VllmConfig) -> Iterator[str]:
    parallel, cache, compilation = config.parallel_config, config.cache_config, config.compilation_config
    settings = {
        "--enable-lora": config.lora_config is not None,
        "--speculative-config": config.speculative_config is not None,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--enable-dbo": parallel.use_ubatching,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--kv-transfer-config or KV offloading": config.kv_transfer_config is not None,
        "--ec-transfer-config": config.ec_transfer_config is not None,
        "`use_inductor_graph_partition`": bool(compilation.use_inductor_graph_partition),
    }
    yield from (name for name, is_set in settings.items() if is_set)


def _check_decoder(config: FlashSlothConfig) -> None:
    """Refuse decoders that vLLM computes differently from transformers.

    Raises:
        ValueError: If vLLM has no such decoder, or its head has no bias, but this one has.
    """
    model_type = config.text_config.model_type
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        raise ValueError(
            f"FlashSloth needs a decoder that vLLM has, but it has none of the type {model_type}; serve the model with "
            "`transformers serve`."
        )
    if config.lm_head_bias and not getattr(registered, "class_name", "").startswith("Transformers"):
        raise ValueError(
            f"`lm_head_bias` is set, but the output embedding of vLLM's {architecture} has no bias, so answers would "
            "be wrong; serve the model with `transformers serve`."
        )


def _translate(model_config: ModelConfig) -> None:
    """Replace the config of an original release, which vLLM reads as Phi's."""
    config = FlashSlothConfig.from_pretrained(model_config.model, revision=model_config.revision)
    config.architectures = list(model_config.hf_config.architectures)
    model_config.hf_config, model_config.hf_text_config = config, config.text_config
    model_config.model_arch_config = model_config.get_model_arch_config()
