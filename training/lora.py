"""Which layers of a FlashSloth take LoRA adapters, and which parts stay whole beside a quantised language model."""

LORA_TARGET_MODULES = r"(?:.*\.)?language_model\.layers\.\d+\.(?:.*\.)?(?:\w+_proj|dense|fc[12]|w[123])"
"""`target_modules` for peft: the linear layers inside the decoder's layers, as Phi, Llama, Qwen, Gemma and their
relatives name them. A plain `q_proj` would also name layers of the vision tower and of the Embedded Query module."""

PAPER_MODULES = ("spatial_attention_pooling", "multi_modal_projector", "embedded_query")
"""What FlashSloth adds to its two base models; `modules_to_save` for peft, to train it whole beside the adapters."""

UNQUANTIZED_MODULES = ("lm_head", "model.vision_tower", *(f"model.{name}" for name in PAPER_MODULES))
"""What stays as it is when the language model is quantised, such as `llm_int8_skip_modules` of `BitsAndBytesConfig`:
names match from the start of a module's full name."""
