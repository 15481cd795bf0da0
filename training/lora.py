"""Names of modules for LoRA adapters and for quantisation."""

LORA_TARGET_MODULES = r"(?:.*\.)?language_model\.layers\.\d+\.(?:.*\.)?(?:\w+_proj|dense|fc[12]|w[123])"
"""`target_modules` for peft: the linear layers inside the decoder's layers, as Phi, Llama, Qwen, Gemma and similar
models name them. A plain `q_proj` would also match layers of the vision tower and of the Embedded Query module."""

PAPER_MODULES = ("spatial_attention_pooling", "multi_modal_projector", "embedded_query")
"""`modules_to_save` for peft: FlashSloth's own modules, which are trained fully next to the adapters."""

UNQUANTIZED_MODULES = ("lm_head", "model.vision_tower", *(f"model.{name}" for name in PAPER_MODULES))
"""Modules to exclude when the language model is quantised, such as `llm_int8_skip_modules` of `BitsAndBytesConfig`.
Names match from the start of a module's full name."""
