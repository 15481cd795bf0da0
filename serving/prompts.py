"""From the messages or the prompt of a request to token ids, in vLLM's frontend.

Whatever cannot be answered correctly is refused here, with status 400 and the reason: an error in the worker would end
the server.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer
from vllm.tokenizers.hf import get_cached_tokenizer

from flashsloth import FlashSlothConfig, FlashSlothProcessor
from flashsloth.modeling_flashsloth import PromptSpans


class FlashSlothTokenizer:
    """Loads the tokenizer of a FlashSloth, in this package's layout or in that of the original releases."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *args: Any,
        revision: str | None = None,
        download_dir: str | None = None,
        truncation_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Load a tokenizer whose chat template is FlashSloth's and keeps control tokens in messages as text.

        Args:
            path_or_repo_id: Folder or Hub id.
            *args: Unused.
            revision: Revision on the Hub.
            download_dir: Folder for downloaded files.
            truncation_side: The side from which vLLM truncates prompts if a request asks for it.
            **kwargs: Further settings of vLLM, which FlashSloth does not need.
        """
        processor = FlashSlothProcessor.from_pretrained(path_or_repo_id, revision=revision, cache_dir=download_dir)
        tokenizer = processor.tokenizer
        tokenizer.truncation_side = truncation_side
        tokenizer.chat_template = processor.chat_template
        tokenizer.apply_chat_template = partial(_apply_chat_template, processor, tokenizer.apply_chat_template)
        return get_cached_tokenizer(tokenizer)


def _apply_chat_template(
    processor: FlashSlothProcessor, apply: Any, conversation: Any, *args: Any, **kwargs: Any
) -> Any:
    return apply(processor.guard_control_tokens(conversation), *args, **kwargs)


class FlashSlothRenderer(HfRenderer):
    """Builds prompts as `FlashSlothProcessor` does, and refuses those that cannot be answered correctly."""

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        """Apply the chat template; see `BaseRenderer.render_messages`."""
        return super().render_messages(messages, _with_parts(params))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """Apply the chat template; see `BaseRenderer.render_messages_async`."""
        return await super().render_messages_async(messages, _with_parts(params))

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        self._prepare(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        self._prepare(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _prepare(self, prompt: dict[str, Any]) -> None:
        """Expand the placeholders of queries, and refuse a prompt that cannot be answered.

        Images come later: vLLM remembers which images it has processed and does not send them to the engine again,
        not even if the first request with them was refused.
        """
        config = self.model_config.hf_config
        prompt["prompt_token_ids"] = token_ids = expand_queries(prompt["prompt_token_ids"], config)
        images = (prompt.get("multi_modal_data") or {}).get("image")
        if images is None:
            check_prompt(token_ids, 0, config)
            return
        is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        num_images, num_placeholders = len(images) if is_batch else 1, token_ids.count(config.image_token_id)
        if num_images != num_placeholders:
            raise VLLMValidationError(
                f"The prompt has {num_placeholders} `<image>` placeholders, but {num_images} images were passed; put "
                "one placeholder, not expanded into image tokens, where each image belongs."
            )
        num_tiles = self.mm_processor.info.num_tiles(prompt.get("mm_processor_kwargs") or {})
        num_image_tokens = num_tiles * config.image_seq_length
        repeats = {config.image_token_id: num_image_tokens}
        expanded = [token_id for token_id in token_ids for _ in range(repeats.get(token_id, 1))]
        check_prompt(expanded, num_images * num_tiles, config)
        if len(expanded) >= self.model_config.max_model_len:
            raise VLLMValidationError(
                f"The prompt has {len(expanded)} tokens, of which {num_images * num_image_tokens} are image tokens of "
                f"{num_images} images, but the model takes {self.model_config.max_model_len}, including the answer. "
                "Shorten the conversation, start a new one, or send fewer images."
            )

    def process_for_engine(self, *args: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        """Refuse truncation of a prompt; see `BaseRenderer.process_for_engine`."""
        _check_truncation(tok_params)
        return super().process_for_engine(*args, tok_params=tok_params, **kwargs)

    async def process_for_engine_async(self, *args: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        """Refuse truncation of a prompt; see `BaseRenderer.process_for_engine_async`."""
        _check_truncation(tok_params)
        return await super().process_for_engine_async(*args, tok_params=tok_params, **kwargs)


def _check_truncation(tok_params: Any) -> None:
    if getattr(tok_params, "truncate_prompt_tokens", None) is not None:
        raise VLLMValidationError(
            "FlashSloth does not take `truncate_prompt_tokens`, which could cut images or questions; shorten the "
            "conversation instead.",
            parameter="truncate_prompt_tokens",
        )


def _with_parts(params: ChatParams) -> ChatParams:
    """Let the chat template place the images; vLLM would write their placeholders into the text."""
    return replace(params, chat_template_content_format="openai")


def expand_queries(token_ids: list[int], config: FlashSlothConfig) -> list[int]:
    """Replace single query tokens, which the chat template writes, by the query tokens of a question.

    Args:
        token_ids: Ids of a prompt; whole blocks of query tokens are kept.
        config: Config of the model.
    """
    query, expanded = config.query_token_id, []
    for index, token_id in enumerate(token_ids):
        is_single = token_id == query and query not in (
            *token_ids[max(index - 1, 0) : index],
            *token_ids[index + 1 : index + 2],
        )
        expanded += [query] * config.num_query_tokens if is_single else [token_id]
    return expanded


def check_prompt(token_ids: list[int], num_tiles: int, config: FlashSlothConfig) -> None:
    """Check that a prompt can be answered correctly.

    Args:
        token_ids: Its ids, with expanded placeholders.
        num_tiles: Tiles of its images.
        config: Config of the model.

    Raises:
        VLLMValidationError: If image tokens and images differ in number, image or query tokens were cut, or query
            tokens have lost their question.
    """
    if not {config.image_token_id, config.query_token_id}.intersection(token_ids):
        return
    spans = PromptSpans(torch.tensor([token_ids]), config)
    spans.copy_counts()
    try:
        spans.check(num_tiles)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
