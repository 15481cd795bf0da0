"""Answers requests of Hugging Face Inference Endpoints, which look for this file beside the weights.

    {"inputs": {"image": PICTURE, "text": "What is it?"}, "parameters": {"max_new_tokens": 50}}
    {"inputs": {"messages": [{"role": "user", "content": [{"type": "image", "image": PICTURE}, ...]}]}}

`PICTURE` is base64, a `data:` or an http(s) URL, never a file; `images` takes several. Messages may be OpenAI's, too.
The answer is `[{"generated_text": "..."}]`; what is wrong with a request is a `ValueError`, which the endpoint reports.
"""

import base64
import io
import math
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

URL_PREFIXES = ("http://", "https://")
DOWNLOAD_TIMEOUT = 30  # seconds
PICTURE_TYPES = ("image", "image_url")
PICTURE_KEYS = ("image", "url", "base64", "image_url")
DEFAULTS = {"max_new_tokens": 512}
PARAMETERS = {
    "do_image_splitting": bool,
    "do_sample": bool,
    "max_new_tokens": int,
    "min_new_tokens": int,
    "num_beams": int,
    "repetition_penalty": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
}
"""What a request may set: of `generate`, and `do_image_splitting`, which reads pictures as five tiles."""

KINDS = {bool: "true or false", int: "a whole number from 0", float: "a number from 0"}


class EndpointHandler:
    """Loads the model once, and answers one request at a time.

    Args:
        path: The repository's folder. Its code is run.
    """

    def __init__(self, path: str = "") -> None:
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = model.to(device).eval()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]]:
        """Answer a request.

        Args:
            data: The request's body: `inputs` or `messages`, and `parameters`.

        Returns:
            `[{"generated_text": ANSWER}]`.

        Raises:
            ValueError: If the request cannot be answered; says why.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a request should be an object with `inputs`, but is {_show(data)}.")
        parameters = DEFAULTS | _read_parameters(data.get("parameters"))
        images_kwargs = {"do_image_splitting": parameters.pop("do_image_splitting", None)}
        messages = _read_messages(data)
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"images_kwargs": images_kwargs},
            ).to(self.model.device, self.model.dtype)
            generated = self.model.generate(**inputs, **parameters)
        except (ArithmeticError, RuntimeError, TypeError) as error:  # such as no beams, or more than memory holds
            raise ValueError(f"the request cannot be answered: {error}") from error
        answers = self.processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])
        return [{"generated_text": answer} for answer in answers]


def _read_parameters(parameters: Any) -> dict[str, Any]:
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError(f"`parameters` should be an object, but is {_show(parameters)}.")
    if unknown := set(parameters) - set(PARAMETERS):
        raise ValueError(
            f"`parameters` has {', '.join(sorted(unknown))}, which nothing reads; it may have "
            f"{', '.join(sorted(PARAMETERS))}."
        )
    return {name: _read_parameter(name, value) for name, value in parameters.items() if value is not None}


def _read_parameter(name: str, value: Any) -> Any:
    """A parameter in the type that `generate` wants; JSON may write 2.0 as 2."""
    kind = PARAMETERS[name]
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number and 0 <= value < math.inf and kind(value) == value
    if not fits:
        raise ValueError(f"`{name}` should be {KINDS[kind]}, but is {_show(value)}.")
    return kind(value)


def _read_messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a request, with opened pictures."""
    inputs = data.get("inputs", data)
    if isinstance(inputs, str):
        inputs = {"text": inputs}
    if isinstance(inputs, dict) and "messages" not in inputs:
        inputs = [_read_question(inputs)]
    messages = inputs["messages"] if isinstance(inputs, dict) else inputs
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` should be a list of messages, but is {_show(messages)}.")
    return [_read_message(message) for message in messages]


def _read_question(inputs: dict[str, Any]) -> dict[str, Any]:
    """The only message of a request with `image` or `images`, and `text`."""
    images, text = inputs.get("images", inputs.get("image")), inputs.get("text")
    if not isinstance(text, str):
        raise ValueError(
            "`inputs` should be a question, or have `messages`, or `text` and maybe `image` or `images`, but "
            f"{'there is no `text`' if text is None else f'`text` is {_show(text)}'}."
        )
    images = images if isinstance(images, list) else [] if images is None else [images]
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _read_message(message: Any) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message should have a `role`, and as `content` text or parts, but is {_show(message)}.")
    if isinstance(content, str):
        return message
    return message | {"content": [_read_part(part) for part in content]}


def _read_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    source = next((part[key] for key in PICTURE_KEYS if key in part), None) if kind in PICTURE_TYPES else None
    if isinstance(source, dict):  # OpenAI's
        source = source.get("url")
    if source is None:
        raise ValueError(
            f"a part of a message should be a text or an image, with `image`, `url` or `base64`, but is {_show(part)}."
        )
    return {"type": "image", "image": _open_picture(source)}


def _open_picture(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str):
        raise ValueError(f"a picture should be base64 or a URL, but is {_show(source)}.")
    try:
        if source.startswith(URL_PREFIXES):
            return load_image(source, timeout=DOWNLOAD_TIMEOUT)
        encoded = source.partition(",")[2] if source.startswith("data:") else source
        with Image.open(io.BytesIO(base64.b64decode("".join(encoded.split()), validate=True))) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow and the network raise a dozen kinds
        raise ValueError(
            f"the picture {_show(source)} is neither base64 nor a URL of a picture that can be read: "
            f"{type(error).__name__}."
        ) from error


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
