"""Handler for Hugging Face Inference Endpoints, which load this file from the model repository.

    {"inputs": {"image": IMAGE, "text": "What is it?"}, "parameters": {"max_new_tokens": 50}}
    {"inputs": {"messages": [{"role": "user", "content": [{"type": "image", "image": IMAGE}, ...]}]}}

`IMAGE` is base64, a `data:` URL or an http(s) URL, but never a path; `images` takes a list. OpenAI's message format is
also accepted. The response is `[{"generated_text": "..."}]`. A bad request raises a `ValueError`, which the endpoint
reports.

Requests are not trusted. URLs are fetched only from hosts with a public address, unless the environment has
`FLASHSLOTH_ALLOW_PRIVATE_URLS=1`, and `LIMITS` bounds the size and the cost of a request.

This file imports nothing from the package, which is not installed on an endpoint.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

URL_PREFIXES = ("http://", "https://")
URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"  # not escaped in a URL
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
CHUNK = 2**16  # bytes read at a time
PROGRAMS = ("EPS",)  # formats that Pillow renders with another program
IMAGE_TYPES = ("image", "image_url")
IMAGE_KEYS = ("image", "url", "base64", "image_url")
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
"""Parameters of a request: those of `generate`, and `do_image_splitting`, which splits images into five tiles."""

CAPPED = {"max_new_tokens": "max_new_tokens", "min_new_tokens": "max_new_tokens", "num_beams": "max_num_beams"}
"""Parameters with an upper bound, and the name of the bound in `LIMITS`."""

MAX_NUMBER = 2**31
KINDS = {bool: "true or false", int: "a whole number of at least 0", float: "a number of at least 0"}

LIMITS = {
    "max_messages": 64,
    "max_text_length": 100_000,  # characters in all messages
    "max_images": 16,
    "max_bytes": 2**25,  # in all image files
    "max_pixels": 2**27,  # in all images: 0.4 GB as RGB
    "max_seconds": 30,  # for all downloads
    "max_new_tokens": 2048,
    "max_num_beams": 8,
}
"""Limits of a request; environment variables such as `FLASHSLOTH_MAX_IMAGES` override them."""

PRIVATE_URLS_VARIABLE = "FLASHSLOTH_ALLOW_PRIVATE_URLS"

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
SPECIAL_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # IETF protocol assignments, and Oracle's metadata service
            "192.88.99.0/24",  # 6to4
            "168.63.129.16/32",  # Azure's metadata service
            "2001::/23",  # IETF protocol assignments, and Teredo, which embeds another address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which embeds another address
            "3fff::/20",  # documentation
        ),
    )
)
"""Networks with addresses that look public, but are not."""


class EndpointHandler:
    """Loads the model once and answers one request at a time.

    Args:
        path: Folder of the model repository, whose code is run.
    """

    def __init__(self, path: str = "") -> None:
        self.limits = _read_limits()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
        # as `default_device` of flashsloth.cli.devices
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self.model = model.to(device).eval()  # type: ignore[arg-type]

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]]:
        """Answer a request.

        Args:
            data: Body of the request: `inputs` or `messages`, and `parameters`.

        Returns:
            `[{"generated_text": ANSWER}]`.

        Raises:
            ValueError: If the request cannot be answered, with the reason.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a request should be an object with `inputs`, but is {_show(data)}.")
        parameters = DEFAULTS | _read_parameters(data.get("parameters"), self.limits)
        images_kwargs = {"do_image_splitting": parameters.pop("do_image_splitting", None)}
        messages = _read_messages(data, _Images(self.limits, self.processor.image_processor.fetch_images))
        try:
            inputs = self.processor.encode_conversations(messages, images_kwargs=images_kwargs)
            inputs = inputs.to(self.model.device, self.model.dtype)
            parameters["max_new_tokens"] = min(parameters["max_new_tokens"], self._room(inputs))
            generated = self.model.generate(**inputs, **parameters)
        except (ArithmeticError, RuntimeError, TypeError) as error:  # such as `num_beams` of 0, or out of memory
            raise ValueError(f"the request cannot be answered: {error}") from error
        answers = self.processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])
        return [{"generated_text": answer} for answer in answers]

    def _room(self, inputs: Any) -> int:
        """Number of tokens left for the answer."""
        num_tokens, longest = inputs["input_ids"].shape[1], self.processor.tokenizer.model_max_length
        if num_tokens >= longest:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but the model was made for {longest}, including the answer; "
                "shorten the conversation, or send fewer images."
            )
        return longest - num_tokens


def _read_limits() -> dict[str, int]:
    """`LIMITS`, with the overrides in the environment.

    Raises:
        ValueError: If an override is not a whole number.
    """
    limits = {}
    for name, default in LIMITS.items():
        variable = f"FLASHSLOTH_{name.upper()}"
        text = os.environ.get(variable) or str(default)
        if not text.isdecimal():
            raise ValueError(f"the environment variable {variable} should be a whole number, but is {text!r}.")
        limits[name] = int(text)
    return limits


class _RefusedError(ValueError):
    """A request exceeds a limit, or has an image in a format that is not allowed."""


def _check_limit(limits: dict[str, int], name: str, found: int, what: str) -> None:
    if found > limits[name]:
        raise _RefusedError(
            f"a request may have {limits[name]} {what}, but has {found}; reduce that, or ask the operator of this "
            f"endpoint to set FLASHSLOTH_{name.upper()}."
        )


class _Images:
    """Opens the images of one request, within its limits.

    Args:
        limits: As `LIMITS`.
        fetch_images: Method of the image processor that opens `{"bytes": bytes}`.
    """

    def __init__(self, limits: dict[str, int], fetch_images: Callable[[dict[str, bytes]], Image.Image]) -> None:
        self.limits, self.fetch_images = limits, fetch_images
        self.num_images = self.num_bytes = self.num_pixels = 0
        self.seconds = float(limits["max_seconds"])

    def open(self, source: Any) -> Image.Image:
        """Open base64, a `data:` URL or an http(s) URL; return PIL images unchanged.

        Raises:
            ValueError: If the image cannot be read or exceeds the limits.
        """
        self.num_images += 1
        self._check("max_images", self.num_images, "images")
        if isinstance(source, Image.Image):
            return source
        if not isinstance(source, str):
            raise ValueError(f"an image should be a base64 string or a URL, but is {_show(source)}.")
        is_url = source[:8].lower().startswith(URL_PREFIXES)
        content = self._fetch(source) if is_url else self._decode(source)
        self.num_bytes += len(content)
        return self._read(content, source)

    def _decode(self, source: str) -> bytes:
        """Decode base64 in either alphabet, with or without padding, or a `data:` URL."""
        is_url = source[:5].lower() == "data:"
        header, _, encoded = source.partition(",") if is_url else (";base64", "", source)
        self._check("max_bytes", self.num_bytes + len(encoded) * 3 // 4, "bytes of images")
        content = unquote_to_bytes(encoded)
        if not header.lower().endswith(";base64"):
            return content
        digits = b"".join(content.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        try:
            return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
        except ValueError as error:
            raise _unreadable(source, error) from error

    def _fetch(self, url: str) -> bytes:
        start = time.monotonic()
        try:
            return _fetch(url, self.limits["max_bytes"] - self.num_bytes, self.seconds)
        except _TooMuchError as error:
            raise ValueError(
                f"{_show(url)} {error}; a request may have {self.limits['max_bytes']} bytes of images and take "
                f"{self.limits['max_seconds']} seconds to download them."
            ) from error
        except (OSError, http.client.HTTPException) as error:  # of sockets, TLS and HTTP
            raise ValueError(f"{_show(url)} cannot be downloaded: {type(error).__name__}.") from error
        finally:
            self.seconds -= time.monotonic() - start

    def _read(self, content: bytes, source: str) -> Image.Image:
        """Check the size and the format of an image file, then let the image processor open it."""
        try:
            with Image.open(io.BytesIO(content)) as image:  # reads only the header
                self.num_pixels += image.width * image.height
                self._check("max_pixels", self.num_pixels, "pixels of images")
                if image.format in PROGRAMS:
                    raise _RefusedError(f"{_show(source)} is a program in {image.format}; send the image as PNG.")
            return self.fetch_images({"bytes": content})
        except _RefusedError:
            raise
        except Exception as error:  # Pillow raises many types
            raise _unreadable(source, error) from error

    def _check(self, name: str, found: int, what: str) -> None:
        _check_limit(self.limits, name, found, what)


def _unreadable(source: str, error: BaseException) -> ValueError:
    return ValueError(
        f"the image {_show(source)} is neither base64 nor the URL of an image that can be read: {type(error).__name__}."
    )


class _TooMuchError(Exception):
    """A download exceeds the time or the bytes that a request has left."""


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to one of the checked addresses of a host, without another DNS lookup.

    It is closed at a deadline even if the server keeps sending: the timeout of a socket applies to each read.
    """

    def __init__(self, url: SplitResult, addresses: list[str], deadline: float) -> None:
        self.is_secure = url.scheme == "https"
        self.default_port = http.client.HTTPS_PORT if self.is_secure else http.client.HTTP_PORT
        super().__init__(_ascii_host(url), url.port or self.default_port)
        self.addresses, self.deadline = addresses, deadline
        self.open_socket: socket.socket | None = None  # `self.sock` is released as soon as the response begins
        self.alarm = threading.Timer(max(0, deadline - time.monotonic()), self._hang_up)

    def connect(self) -> None:
        """Connect, and verify the certificate of the host."""
        self._keep(self._first_socket())
        if self.is_secure:
            context, host = ssl.create_default_context(), self.host.rstrip(".")
            self._keep(context.wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False))
            self.sock.do_handshake()

    def _first_socket(self) -> socket.socket:
        for address in self.addresses:
            try:
                return socket.create_connection((address, self.port), max(0.01, self.deadline - time.monotonic()))
            except OSError as error:
                reason = error
        raise reason

    def _keep(self, connected: socket.socket) -> None:
        self.sock = self.open_socket = connected
        if time.monotonic() >= self.deadline:  # the alarm may have gone off before there was a socket
            raise TimeoutError

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError, TypeError):  # closed, or not open yet
            socket.socket.shutdown(self.open_socket, socket.SHUT_RDWR)

    def __enter__(self) -> "_PinnedConnection":
        self.alarm.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.alarm.cancel()
        self.close()
        may_be_cut_off = error is None or isinstance(error, (OSError, http.client.HTTPException))
        if may_be_cut_off and time.monotonic() >= self.deadline:
            raise _TooMuchError("takes too long") from error


def _fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """Download a URL in at most `seconds`, and at most `max_bytes`.

    Raises:
        ValueError: If the URL, or one it redirects to, is not http(s), has no public address, or does not answer 200.
        _TooMuchError: If the download exceeds a limit.
        OSError: If a socket fails.
        HTTPException: If the server does not speak HTTP.
    """
    deadline = time.monotonic() + seconds
    for _ in range(1 + MAX_REDIRECTS):
        location, content = _fetch_once(url, max_bytes, deadline)
        if location is None:
            return content
        url = location
    raise ValueError(f"{_show(url)} was reached after more than {MAX_REDIRECTS} redirects.")


def _fetch_once(url: str, max_bytes: int, deadline: float) -> tuple[str | None, bytes]:
    """The target of a redirect, or `None` and the content."""
    parts = _split(url)
    target = quote(parts._replace(scheme="", netloc="", fragment="").geturl() or "/", safe=URL_CHARACTERS)
    with _PinnedConnection(parts, _resolve(parts), deadline) as connection:
        connection.request("GET", target, headers={"User-Agent": "FlashSloth", "Accept": "image/*"})
        response = connection.getresponse()
        location = response.headers["Location"]
        if location and response.status in REDIRECTS:
            return _join(url, location), b""
        if response.status != http.client.OK:
            raise ValueError(f"{_show(url)} answers {response.status} {response.reason[:40]}.")
        return None, b"".join(_chunks(response, max_bytes))


def _chunks(response: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    if (response.length or 0) > max_bytes:
        raise _TooMuchError(f"has {response.length} bytes")
    num_bytes = 0
    while chunk := response.read1(CHUNK):
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _TooMuchError(f"has more than {max_bytes} bytes")
        yield chunk
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_supported = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # such as a port that is not a number
        is_supported = False
    if not is_supported:
        raise ValueError(f"the URL of an image should be http://HOST/... or https://HOST/..., but is {_show(url)}.")
    return parts


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location.encode("latin-1").decode())  # `http.client` decodes all headers as Latin-1
    except ValueError as error:
        raise ValueError(f"{_show(url)} redirects to {_show(location)}, which is not a URL.") from error


def _ascii_host(parts: SplitResult) -> str:
    try:
        return parts.hostname.encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"{_show(parts.hostname)} is not a host name.") from error


def _resolve(parts: SplitResult) -> list[str]:
    """Allowed addresses of a URL's host, however it is spelled, from one DNS lookup."""
    host = _ascii_host(parts)
    try:
        found = socket.getaddrinfo(host, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"the host {_show(host)} cannot be resolved.") from error
    addresses = [str(address[0]) for *_, address in found]
    allowed = addresses if _private_urls_allowed() else list(filter(_is_public, addresses))
    if not allowed:
        raise ValueError(
            f"{_show(host)} has no public address, so images are not downloaded from it. Send the image as base64, or "
            f"ask the operator of this endpoint to set {PRIVATE_URLS_VARIABLE}=1."
        )
    return allowed


def _private_urls_allowed() -> bool:
    return os.environ.get(PRIVATE_URLS_VARIABLE, "").lower() in ("1", "true", "yes")


def _is_public(address: str) -> bool:
    """Whether an address is public; addresses that embed another one, such as NAT64's, are not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in SPECIAL_NETWORKS):
        return False
    if ip.version == 6:
        return ip in PUBLIC_IPV6
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _read_parameters(parameters: Any, limits: dict[str, int]) -> dict[str, Any]:
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError(f"`parameters` should be an object, but is {_show(parameters)}.")
    if unknown := set(parameters) - set(PARAMETERS):
        raise ValueError(
            f"`parameters` has unknown names: {', '.join(sorted(unknown))}; known are {', '.join(sorted(PARAMETERS))}."
        )
    given = {name: _read_parameter(name, value) for name, value in parameters.items() if value is not None}
    for name, limit in CAPPED.items():
        _check_limit(limits, limit, given.get(name, 0), f"`{name}`")
    return given


def _read_parameter(name: str, value: Any) -> Any:
    """Check a parameter and convert it to the type that `generate` expects; JSON may write 2.0 as 2."""
    kind = PARAMETERS[name]
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number and 0 <= value < MAX_NUMBER and kind(value) == value
    if not fits:
        raise ValueError(f"`{name}` should be {KINDS[kind]}, but is {_show(value)}.")
    return kind(value)


def _read_messages(data: dict[str, Any], images: _Images) -> list[dict[str, Any]]:
    """The conversation of a request, with its images opened."""
    inputs = data.get("inputs", data)
    if isinstance(inputs, str):
        inputs = {"text": inputs}
    if isinstance(inputs, dict) and "messages" not in inputs:
        inputs = [_read_question(inputs)]
    messages = inputs["messages"] if isinstance(inputs, dict) else inputs
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` should be a list of messages, but is {_show(messages)}.")
    _check_limit(images.limits, "max_messages", len(messages), "messages")
    messages = [_read_message(message, images) for message in messages]
    length = sum(len(text) for message in messages for text in _texts(message))
    _check_limit(images.limits, "max_text_length", length, "characters of text")
    return messages


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _read_question(inputs: dict[str, Any]) -> dict[str, Any]:
    """The user message of a request with `text`, and `image` or `images`."""
    images, text = inputs.get("images", inputs.get("image")), inputs.get("text")
    if not isinstance(text, str):
        raise ValueError(
            "`inputs` should be a question, or have `messages`, or have `text` and optionally `image` or `images`, but "
            f"{'there is no `text`' if text is None else f'`text` is {_show(text)}'}."
        )
    images = images if isinstance(images, list) else [] if images is None else [images]
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _read_message(message: Any, images: _Images) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"a message should have a `role`, and `content` that is text or a list of parts, but is {_show(message)}."
        )
    if isinstance(content, str):
        return message
    return message | {"content": [_read_part(part, images) for part in content]}


def _read_part(part: Any, images: _Images) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    source = next((part[key] for key in IMAGE_KEYS if key in part), None) if kind in IMAGE_TYPES else None
    if isinstance(source, dict):  # OpenAI's form
        source = source.get("url")
    if source is None:
        raise ValueError(
            f"a part of a message should be text, or an image with `image`, `url` or `base64`, but is {_show(part)}."
        )
    return {"type": "image", "image": images.open(source)}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
