"""Answers requests of Hugging Face Inference Endpoints, which look for this file next to the weights.

    {"inputs": {"image": IMAGE, "text": "What is it?"}, "parameters": {"max_new_tokens": 50}}
    {"inputs": {"messages": [{"role": "user", "content": [{"type": "image", "image": IMAGE}, ...]}]}}

`IMAGE` is base64, a `data:` or an http(s) URL, never a file; `images` takes several. Messages may be OpenAI's, too.
The answer is `[{"generated_text": "..."}]`; what is wrong with a request is a `ValueError`, which the endpoint reports.

Requests may come from strangers. A URL is fetched only from hosts with a public address, unless the environment has
`FLASHSLOTH_ALLOW_PRIVATE_URLS=1`; `LIMITS` says how much a request may ask for.
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
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

URL_PREFIXES = ("http://", "https://")
URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"  # what stands for itself in a URL
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
CHUNK = 2**16  # bytes read at a time
PROGRAMS = ("EPS",)  # formats of which Pillow has another program make an image
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
"""What a request may set: of `generate`, and `do_image_splitting`, which reads images as five tiles."""

CAPPED = {"max_new_tokens": "max_new_tokens", "min_new_tokens": "max_new_tokens", "num_beams": "max_num_beams"}
"""Parameters that `LIMITS` has something to say about."""

MAX_NUMBER = 2**31
KINDS = {bool: "true or false", int: "a whole number from 0", float: "a number from 0"}

LIMITS = {
    "max_messages": 64,
    "max_text_length": 100_000,  # characters, of all messages
    "max_images": 16,
    "max_bytes": 2**25,  # of all image files
    "max_pixels": 2**27,  # of all images: 0.4 GB as RGB
    "max_seconds": 30,  # for all downloads
    "max_new_tokens": 2048,
    "max_num_beams": 8,
}
"""How much a request may ask for; the environment's `FLASHSLOTH_MAX_IMAGES` and so on change it."""

PRIVATE_URLS_VARIABLE = "FLASHSLOTH_ALLOW_PRIVATE_URLS"

PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
SPECIAL_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # IETF's own, and Oracle's metadata service
            "192.88.99.0/24",  # 6to4
            "168.63.129.16/32",  # Azure's metadata service
            "2001::/23",  # IETF's own, and Teredo, which carries another address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which carries another address
            "3fff::/20",  # documentation
        ),
    )
)
"""Networks of addresses that look public and lead elsewhere."""


class EndpointHandler:
    """Loads the model once, and answers one request at a time.

    Args:
        path: The repository's folder. Its code is run.
    """

    def __init__(self, path: str = "") -> None:
        self.limits = _read_limits()
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
        parameters = DEFAULTS | _read_parameters(data.get("parameters"), self.limits)
        images_kwargs = {"do_image_splitting": parameters.pop("do_image_splitting", None)}
        messages = _read_messages(data, _Images(self.limits))
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"images_kwargs": images_kwargs},
            ).to(self.model.device, self.model.dtype)
            parameters["max_new_tokens"] = min(parameters["max_new_tokens"], self._room(inputs))
            generated = self.model.generate(**inputs, **parameters)
        except (ArithmeticError, RuntimeError, TypeError) as error:  # such as no beams, or more than memory holds
            raise ValueError(f"the request cannot be answered: {error}") from error
        answers = self.processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])
        return [{"generated_text": answer} for answer in answers]

    def _room(self, inputs: Any) -> int:
        """Tokens that are left for the answer."""
        num_tokens, longest = inputs["input_ids"].shape[1], self.processor.tokenizer.model_max_length
        if num_tokens >= longest:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but the model was made for {longest}, with the answer; shorten "
                "the conversation, or send fewer images."
            )
        return longest - num_tokens


def _read_limits() -> dict[str, int]:
    """`LIMITS`, as the environment changes them.

    Raises:
        ValueError: If the environment has one that is no whole number.
    """
    limits = {}
    for name, default in LIMITS.items():
        variable = f"FLASHSLOTH_{name.upper()}"
        text = os.environ.get(variable) or str(default)
        if not text.isdecimal():
            raise ValueError(f"the environment's {variable} should be a whole number, but is {text!r}.")
        limits[name] = int(text)
    return limits


class _RefusedError(ValueError):
    """A request asks for what it may not have."""


def _check_limit(limits: dict[str, int], name: str, found: int, what: str) -> None:
    if found > limits[name]:
        raise _RefusedError(
            f"a request may have {limits[name]} {what}, but has {found}; send less, or whoever runs this endpoint may "
            f"set FLASHSLOTH_{name.upper()}."
        )


class _Images:
    """Opens the images of one request, within its limits.

    Args:
        limits: As `LIMITS`.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.num_images = self.num_bytes = self.num_pixels = 0
        self.seconds = float(limits["max_seconds"])

    def open(self, source: Any) -> Image.Image:
        """Open base64, a `data:` or an http(s) URL, or take an image that is open.

        Raises:
            ValueError: If it cannot be read, or asks for more than the limits.
        """
        self.num_images += 1
        self._check("max_images", self.num_images, "images")
        if isinstance(source, Image.Image):
            return source
        if not isinstance(source, str):
            raise ValueError(f"an image should be base64 or a URL, but is {_show(source)}.")
        is_url = source[:8].lower().startswith(URL_PREFIXES)
        content = self._fetch(source) if is_url else self._decode(source)
        self.num_bytes += len(content)
        return self._read(content, source)

    def _decode(self, source: str) -> bytes:
        """Decode base64 in either alphabet, with or without padding, alone or in a `data:` URL."""
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
                f"{_show(url)} {error}; a request may take {self.limits['max_bytes']} bytes of images, and "
                f"{self.limits['max_seconds']} seconds to load them."
            ) from error
        except (OSError, http.client.HTTPException) as error:  # those of sockets, TLS and the protocol
            raise ValueError(f"{_show(url)} cannot be loaded: {type(error).__name__}.") from error
        finally:
            self.seconds -= time.monotonic() - start

    def _read(self, content: bytes, source: str) -> Image.Image:
        """Decode an image in its own mode, as the image processor does with a file."""
        try:
            with Image.open(io.BytesIO(content)) as image:  # reads its size alone
                self.num_pixels += image.width * image.height
                self._check("max_pixels", self.num_pixels, "pixels of images")
                if image.format in PROGRAMS:
                    raise _RefusedError(f"{_show(source)} is a program in {image.format}; send what it draws, as PNG.")
                return ImageOps.exif_transpose(image)
        except _RefusedError:
            raise
        except Exception as error:  # Pillow raises a dozen kinds
            raise _unreadable(source, error) from error

    def _check(self, name: str, found: int, what: str) -> None:
        _check_limit(self.limits, name, found, what)


def _unreadable(source: str, error: BaseException) -> ValueError:
    return ValueError(
        f"the image {_show(source)} is neither base64 nor a URL of an image that can be read: {type(error).__name__}."
    )


class _TooMuchError(Exception):
    """A download takes more time or bytes than are left."""


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to one of the addresses that a host had when they were checked.

    It ends at a deadline, however slowly the other side goes on: a socket's own limit is for one read.
    """

    def __init__(self, url: SplitResult, addresses: list[str], deadline: float) -> None:
        self.is_secure = url.scheme == "https"
        self.default_port = http.client.HTTPS_PORT if self.is_secure else http.client.HTTP_PORT
        super().__init__(_ascii_host(url), url.port or self.default_port)
        self.addresses, self.deadline = addresses, deadline
        self.held: socket.socket | None = None  # `self.sock` is given up as soon as the answer begins
        self.alarm = threading.Timer(max(0, deadline - time.monotonic()), self._hang_up)

    def connect(self) -> None:
        """Connect; the certificate must be the host's."""
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
        self.sock = self.held = connected
        if time.monotonic() >= self.deadline:  # the alarm may have come before there was a socket
            raise TimeoutError

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError, TypeError):  # it is closed, or not open yet
            socket.socket.shutdown(self.held, socket.SHUT_RDWR)

    def __enter__(self) -> "_PinnedConnection":
        self.alarm.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.alarm.cancel()
        self.close()
        is_cut = error is None or isinstance(error, (OSError, http.client.HTTPException))
        if is_cut and time.monotonic() >= self.deadline:
            raise _TooMuchError("takes too long") from error


def _fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """Load what a URL leads to, in at most `seconds` and `max_bytes`.

    Raises:
        ValueError: If the URL, or one that it redirects to, is not http(s), is refused, or answers anything but 200.
        _TooMuchError: If it takes more time or bytes.
        OSError: As sockets raise it.
        HTTPException: If the other side does not speak HTTP.
    """
    deadline = time.monotonic() + seconds
    for _ in range(1 + MAX_REDIRECTS):
        location, content = _fetch_once(url, max_bytes, deadline)
        if location is None:
            return content
        url = location
    raise ValueError(f"{_show(url)} comes after more than {MAX_REDIRECTS} redirects.")


def _fetch_once(url: str, max_bytes: int, deadline: float) -> tuple[str | None, bytes]:
    """Where a URL redirects to, if it does, and else what it leads to."""
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
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # such as a port that is no number
        is_good = False
    if not is_good:
        raise ValueError(f"an image's URL should be http://HOST/... or https://HOST/..., but is {_show(url)}.")
    return parts


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location.encode("latin-1").decode())  # headers come as Latin-1, whatever they are
    except ValueError as error:
        raise ValueError(f"{_show(url)} redirects to {_show(location)}, which is no URL.") from error


def _ascii_host(parts: SplitResult) -> str:
    try:
        return parts.hostname.encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"{_show(parts.hostname)} is no name of a host.") from error


def _resolve(parts: SplitResult) -> list[str]:
    """Addresses of a URL's host that may be asked; names and odd spellings are read by the system, once."""
    host = _ascii_host(parts)
    try:
        found = socket.getaddrinfo(host, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{_show(host)} is no host that is known here.") from error
    addresses = [str(address[0]) for *_, address in found]
    allowed = addresses if _private_urls_allowed() else list(filter(_is_public, addresses))
    if not allowed:
        raise ValueError(
            f"{_show(host)} has no public address, so no image is loaded from it. Send the image as base64; or whoever "
            f"runs this endpoint may set {PRIVATE_URLS_VARIABLE}=1."
        )
    return allowed


def _private_urls_allowed() -> bool:
    return os.environ.get(PRIVATE_URLS_VARIABLE, "").lower() in ("1", "true", "yes")


def _is_public(address: str) -> bool:
    """Whether an address is one of the open Internet; one that carries another, such as NAT64's, is not."""
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
            f"`parameters` has {', '.join(sorted(unknown))}, which nothing reads; it may have "
            f"{', '.join(sorted(PARAMETERS))}."
        )
    given = {name: _read_parameter(name, value) for name, value in parameters.items() if value is not None}
    for name, limit in CAPPED.items():
        _check_limit(limits, limit, given.get(name, 0), f"`{name}`")
    return given


def _read_parameter(name: str, value: Any) -> Any:
    """A parameter in the type that `generate` wants; JSON may write 2.0 as 2."""
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
    """The conversation of a request, with opened images."""
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


def _read_message(message: Any, images: _Images) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message should have a `role`, and as `content` text or parts, but is {_show(message)}.")
    if isinstance(content, str):
        return message
    return message | {"content": [_read_part(part, images) for part in content]}


def _read_part(part: Any, images: _Images) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    source = next((part[key] for key in IMAGE_KEYS if key in part), None) if kind in IMAGE_TYPES else None
    if isinstance(source, dict):  # OpenAI's
        source = source.get("url")
    if source is None:
        raise ValueError(
            f"a part of a message should be a text or an image, with `image`, `url` or `base64`, but is {_show(part)}."
        )
    return {"type": "image", "image": images.open(source)}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
