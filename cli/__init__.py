"""Command line of FlashSloth.

flashsloth ask IMAGE QUESTION      answer a question about an image, or several
flashsloth chat IMAGE              answer questions about an image, one after the other
flashsloth caption SOURCE          answer a question about every image of a folder or table
flashsloth demo                    show a chat about an image in the browser
flashsloth convert SOURCE OUTPUT   convert an original release to a complete model repository
flashsloth init OUTPUT             build an untrained model from a vision tower and a decoder
flashsloth export CHECKPOINT OUT   turn a checkpoint into a complete model repository
flashsloth onnx CHECKPOINT OUTPUT  export a checkpoint to ONNX

Each function in `COMMANDS` adds the parser of one command and sets its default `run` to the function that executes it.
The modules that a command needs are imported only when it runs, so that `--help` is fast.
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

PROGRAM = "flashsloth"
SHIPPED_CHECKPOINT = Path(__file__).parents[1]
SHIPPED_CHECKPOINT_NOTE = (
    "This is the small demonstration checkpoint. It knows drawn shapes, emoji, and printed words and numbers; it does "
    "not know photographs."
)
STDIN = "-"
DEFAULT_MAX_NEW_TOKENS = 512
NUM_SHOWN_FILES = 12
NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
IMAGE_HELP = "a file, an http(s) URL, or - for standard input"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ONNX_DTYPES = ("float32", "float16", "int8", "int4")
EXIT_ERROR = 2
EXIT_SIGNAL = 128  # plus the number of the signal, as shells do
EXIT_BROKEN_PIPE = EXIT_SIGNAL + 13


class CommandError(Exception):
    """An error that the user can fix; shown without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments. Default: those of the process.

    Returns:
        Exit code: 0, 2 for an error that the user can fix, or 128 plus the number of the signal that ended the command.
    """
    options = build_parser().parse_args(arguments)
    try:
        with _termination_as_exit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries, about their own code
            options.run(options)
            sys.stdout.flush()
    except CommandError as error:
        _report(error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return EXIT_SIGNAL + signal.SIGINT
    except BrokenPipeError:  # such as `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="FlashSloth, a small and fast vision-language model.")
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, default=argparse.SUPPRESS, help="show the versions in use, and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


class _ShowVersion(argparse.Action):
    """Shows the versions that a bug report needs. They are read only when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform
        from importlib.metadata import version

        from .. import __version__

        libraries = (f"{name} {version(name)}" for name in ("transformers", "torch"))
        sys.stdout.write("\n".join([f"{PROGRAM} {__version__}", *libraries, f"Python {platform.python_version()}", ""]))
        parser.exit()


def _add_ask(commands: Any) -> None:
    parser = commands.add_parser("ask", help="answer a question about an image, or several")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("question", metavar="QUESTION")
    _add_model_options(parser, max_new_tokens=DEFAULT_MAX_NEW_TOKENS)
    parser.set_defaults(run=_ask)


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="answer questions about an image, one after the other",
        description="Chat about an image, or several. They are encoded once. Ctrl-C stops an answer, Ctrl-D ends the "
        "chat. Without a terminal, every line of standard input is a question.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file or an http(s) URL")
    _add_model_options(parser, max_new_tokens=DEFAULT_MAX_NEW_TOKENS)
    parser.set_defaults(run=_chat)


def _add_caption(commands: Any) -> None:
    parser = commands.add_parser(
        "caption",
        help="answer a question about every image of a folder or table",
        description="Answer a question about every image, in one process or, started by torchrun, in several. Start an "
        "interrupted run again to resume it.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="folder of images; .json, .jsonl or .parquet file; data set"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder for the answers, shared by all processes"
    )
    parser.add_argument("--question", default="Describe the picture.", help="(default: %(default)s)")
    _add_model_options(parser, max_new_tokens=128)
    numbers = (
        ("--batch-size", _positive_int, 16, "images per batch"),
        ("--loaders", _not_negative_int, min(2, NUM_CPUS), "worker processes that read images"),
    )
    for name, kind, default, explanation in numbers:
        parser.add_argument(name, metavar="N", type=kind, default=default, help=f"{explanation} (default: %(default)s)")
    parser.set_defaults(run=_caption)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="show a chat about an image in the browser",
        description="Serve a chat about an image, which shows what the model looked at. Needs Gradio.",
    )
    _add_model_options(parser, max_new_tokens=DEFAULT_MAX_NEW_TOKENS, hd=False)
    parser.add_argument("--host", help="address to serve on (default: localhost only); 0.0.0.0 for all interfaces")
    parser.add_argument("--port", metavar="N", type=_positive_int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="create a public Gradio link")
    parser.set_defaults(run=_demo)


def _add_model_options(parser: argparse.ArgumentParser, *, max_new_tokens: int, hd: bool = True) -> None:
    """Add the options of all commands that answer questions."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="folder or Hub id (default: the demonstration checkpoint in the package)"
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_positive_int,
        default=max_new_tokens,
        help="maximum length of an answer in tokens (default: %(default)s)",
    )
    if hd:
        parser.add_argument(
            "--hd",
            dest="do_image_splitting",
            action="store_const",
            const=True,
            help="split every image into five tiles (default: the checkpoint's setting)",
        )
    parser.add_argument(
        "--device", metavar="NAME", help="such as cpu, cuda, cuda:1 or mps (default: the accelerator, if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="data type of the weights (default: the checkpoint's; float32 on CPUs without bfloat16 instructions)",
    )


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="convert an original release to a complete model repository")
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the release")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    parser.add_argument(
        "--vision-config",
        metavar="DIR",
        help="folder with the config.json of the vision tower, if it is not that of the released models",
    )
    parser.set_defaults(run=_convert)


def _add_init(commands: Any) -> None:
    parser = commands.add_parser(
        "init",
        help="build an untrained model from a vision tower and a decoder",
        description="Connect a pretrained vision tower and a pretrained decoder with newly initialised modules.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    parser.add_argument(
        "--vision",
        metavar="DIR_OR_ID",
        required=True,
        help="a vision tower with square patches (SigLIP, CLIP, DINOv2, AIMv2 …), or a FlashSloth, to use its tower",
    )
    parser.add_argument(
        "--language", metavar="DIR_OR_ID", required=True, help="a causal decoder (Phi, Llama, Qwen3, SmolLM3 …)"
    )
    parser.add_argument(
        "--vision-layer",
        metavar="N",
        type=int,
        help="which hidden state of the tower to use: -1 is the output of the last layer, -2 its input, and so on; "
        "later layers are dropped (default: -2, as in the released models, or -1 for the tower of a FlashSloth)",
    )
    for name, explanation in (
        (
            "--image-size",
            "side of a tile in pixels (default: the tower's; otherwise its position embeddings are interpolated)",
        ),
        (
            "--pooling-window-size",
            "side of a pooling window in patches (default: the size that gives at most about 9x9 tokens; 1, which does "
            "not compress, only if the side of the patch grid is prime)",
        ),
        (
            "--query-layer-idx",
            "decoder layer before which the query tokens are updated (default: 7 of 32, or the same relative depth)",
        ),
    ):
        parser.add_argument(name, metavar="N", type=_positive_int, help=explanation)
    for name, default, explanation in (
        ("--num-query-tokens", 9, "query tokens per question"),
        ("--query-hidden-size", 576, "hidden size of the Embedded Query module"),
    ):
        text = f"{explanation} (default: %(default)s)"
        parser.add_argument(name, metavar="N", type=_positive_int, default=default, help=text)
    parser.add_argument(
        "--hd", dest="do_image_splitting", action="store_true", help="split images into five tiles (FlashSloth-HD)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template with <image> and <learnable> (default: derived from the decoder's chat template, or "
        "USER: … ASSISTANT: if it has none)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="data type of the weights (default: the decoder's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new modules (default: %(default)s)")
    parser.set_defaults(run=_init)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="turn a checkpoint into a complete model repository",
        description="Write the files of a Hub repository; other files in the checkpoint's folder are not copied.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a FlashSloth, or of a LoRA adapter for one")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    for name, metavar, explanation in (
        ("--processor", "DIR_OR_ID", "folder or Hub id of the processor, if CHECKPOINT has none"),
        ("--name", "NAME", "name of the model in the model card, such as USER/NAME (default: OUTPUT's name)"),
        ("--license", "ID", "licence of the weights, such as apache-2.0 (default: from CHECKPOINT's model card)"),
    ):
        parser.add_argument(name, metavar=metavar, help=explanation)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of the weights (default: CHECKPOINT's)"
    )
    for name, metavar, explanation in (
        ("--base-model", "ID", "Hub id of a model that this one is based on (default: from CHECKPOINT's model card)"),
        ("--evaluation", "FILE", "JSON of lmms-eval or score.py (default: CHECKPOINT's evaluation.json, if any)"),
    ):
        text = f"{explanation}; may be repeated"
        parser.add_argument(name, metavar=metavar, action="append", default=[], help=text)
    parser.add_argument(
        "--example",
        nargs=2,
        metavar=("IMAGE", "QUESTION"),
        action="append",
        default=[],
        help="image (file or URL) and question for the widget on the Hub, with the model's answer; may be repeated",
    )
    parser.set_defaults(run=_export)


def _add_onnx(commands: Any) -> None:
    parser = commands.add_parser(
        "onnx",
        help="export a checkpoint to ONNX",
        description="Write ONNX graphs of the vision part and of the decoder, and compare them with the model.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a FlashSloth")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must be empty or not exist")
    parser.add_argument(
        "--dtype",
        choices=ONNX_DTYPES,
        default=ONNX_DTYPES[0],
        help="data type of the weights: int8 and int4 store those of matrix products in 8 or 4 bits (default: "
        "%(default)s)",
    )
    parser.set_defaults(run=_onnx)


COMMANDS: tuple[Callable[[Any], None], ...] = (
    *(_add_ask, _add_chat, _add_caption, _add_demo),
    *(_add_convert, _add_init, _add_export, _add_onnx),
)


def _ask(options: argparse.Namespace) -> None:
    images = _read_images(options.images)
    model, processor = _load_chosen_model(options)
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": options.question})
    try:
        inputs = processor.encode_conversations(
            [{"role": "user", "content": content}], do_image_splitting=options.do_image_splitting
        ).to(model.device, model.dtype)
        model.generate(**inputs, max_new_tokens=options.max_new_tokens, streamer=_build_streamer(processor.tokenizer))
    except ValueError as error:  # such as a question that is too long
        raise CommandError(f"the question cannot be answered: {first_line(error)}") from error


def _chat(options: argparse.Namespace) -> None:
    if STDIN in options.images:
        raise CommandError("standard input has the questions; give the image as a file or a URL.")
    images = _read_images(options.images)
    model, processor = _load_chosen_model(options)
    from . import chat

    conversation = chat.Chat(model, processor, images, options.max_new_tokens, options.do_image_splitting)
    chat.run(
        conversation,
        lambda: _build_streamer(processor.tokenizer),
        lambda error: _report(f"the question cannot be answered: {first_line(error)}"),
    )


def _caption(options: argparse.Namespace) -> None:
    from . import caption

    model = str(options.model or SHIPPED_CHECKPOINT)
    settings = caption.Settings(
        model, options.question, options.batch_size, options.max_new_tokens, options.do_image_splitting
    )
    try:
        summary = caption.caption(
            options.source,
            options.output,
            settings,
            load_model=lambda: _load_model(model, options.dtype, options.device),
            num_loaders=options.loaders,
        )
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(first_line(error)) from error
    if summary:
        sys.stdout.write(f"{summary}\n")


def _demo(options: argparse.Namespace) -> None:
    try:
        from . import demo
    except ImportError as error:
        raise CommandError(first_line(error)) from error
    model, processor = _load_chosen_model(options, note=False)  # the page has the note
    page = demo.Demo(model, processor, options.max_new_tokens)
    try:
        demo.launch(page, server_name=options.host, server_port=options.port, share=options.share)
    except OSError as error:  # such as a port in use
        raise CommandError(first_line(error)) from error


def _convert(options: argparse.Namespace) -> None:
    from .convert import ConversionError, convert

    _silence_transformers(show_progress=True)
    try:
        done = convert(options.source, options.output, vision_config=options.vision_config)
    except (ConversionError, OSError) as error:
        raise CommandError(error) from error
    sys.stdout.write(
        f"{done.output}: {done.num_parameters:,} parameters in {done.num_tensors} tensors, {done.dtype}, "
        f"{done.num_bytes / 1e6:,.1f} MB in {done.num_shards} shard{'s' * (done.num_shards > 1)}\n"
    )


def _init(options: argparse.Namespace) -> None:
    from .init import NOTHING_POOLED, init
    from .repository import RepositoryError

    _silence_transformers()
    template = _read_text(options.chat_template) if options.chat_template else None
    settings = {name: value for name, value in vars(options).items() if name not in ("run", "chat_template")}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", NOTHING_POOLED.partition(":")[0])
            done = init(**settings, chat_template=template)
    except (RepositoryError, OSError) as error:
        raise CommandError(first_line(error)) from error
    sys.stderr.writelines(f"{PROGRAM}: warning: {warning.message}\n" for warning in caught)
    config, decoder = done.config, done.config.text_config
    sys.stdout.write(
        f"{done.output}: {done.num_parameters:,} parameters, {done.num_new_parameters:,} of them new, {done.dtype}\n"
        f"{config.num_patches} patches and {config.image_seq_length} image tokens per tile; query tokens updated at "
        f"layer {config.query_layer_idx} of {decoder.num_hidden_layers}; answers end with {done.end_token}; "
        f"{done.num_new_rows} rows added to the vocabulary of {decoder.vocab_size}\n"
    )


def _export(options: argparse.Namespace) -> None:
    from .export import export
    from .repository import RepositoryError

    _silence_transformers()
    try:
        done = export(
            options.checkpoint,
            options.output,
            processor=options.processor,
            name=options.name,
            dtype=options.dtype,
            license_id=options.license,
            base_models=options.base_model,
            evaluations=options.evaluation,
            examples=options.example,
        )
    except (RepositoryError, OSError) as error:
        raise CommandError(first_line(error)) from error
    lines = [f"{done.output}: {done.num_parameters:,} parameters, {done.dtype}, {done.num_bytes / 1e6:,.1f} MB"]
    if done.left_out:
        num_more = len(done.left_out) - NUM_SHOWN_FILES
        more = f" and {num_more} more" if num_more > 0 else ""
        lines.append(f"not copied: {', '.join(done.left_out[:NUM_SHOWN_FILES])}{more}")
    lines += done.unanswered
    if done.license_id is None:
        lines.append("the licence is unknown; set it with --license")
    if done.quantization and not done.base_models:
        lines.append(f"the weights are quantised ({done.quantization}); name the original model with --base-model")
    sys.stdout.write("\n".join([*lines, f"to publish it: hf upload USER/NAME {done.output}", ""]))


def _onnx(options: argparse.Namespace) -> None:
    from .repository import RepositoryError

    model, processor = _load_model(options.checkpoint, "float32")
    try:
        from .onnx import export_onnx

        done = export_onnx(model.to("cpu"), processor, options.output, dtype=options.dtype, progress=True)
    except (RepositoryError, OSError) as error:
        raise CommandError(first_line(error)) from error
    for name, difference in done.differences.items():
        sys.stdout.write(f"{done.output / name}: differs from the model by {difference:.0e} of the largest value\n")


def _read_images(sources: Sequence[str]) -> list["Image.Image"]:
    if sources.count(STDIN) > 1:
        raise CommandError("standard input has one image; give the others as files or URLs.")
    return [_read_image(source) for source in sources]


def _read_image(source: str) -> "Image.Image":
    """Open an image from a file, a URL or standard input."""
    from PIL import UnidentifiedImageError

    from ..image_processing_flashsloth import FlashSlothImageProcessor, is_web_address

    is_file = source != STDIN and not is_web_address(source)
    if is_file and os.path.isdir(source):  # noqa: PTH112  (as below)
        command = f"{PROGRAM} caption {shlex.quote(source)} --question QUESTION --output DIR"
        raise CommandError(f"{source} is a folder; to ask about every image in it, use `{command}`.")
    if is_file and not os.path.isfile(source):  # noqa: PTH113  (`Path.is_file` raises for a name that is too long)
        raise CommandError(f"no such file: {source}")
    image = {"bytes": sys.stdin.buffer.read()} if source == STDIN else source
    shown = "standard input" if source == STDIN else source
    try:
        return FlashSlothImageProcessor().fetch_images(image)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise CommandError(f"{shown} is not an image in a format that Pillow reads.") from error
        raise CommandError(f"{shown} cannot be read: {first_line(error.__cause__)}") from error


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CommandError(f"no such file: {file}") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{file} cannot be read: {first_line(error)}") from error


def _load_chosen_model(options: argparse.Namespace, *, note: bool = True) -> tuple[Any, Any]:
    """Load the model of the command line, or the shipped checkpoint and, by default, say what it is."""
    loaded = _load_model(str(options.model or SHIPPED_CHECKPOINT), options.dtype, options.device)
    if options.model is None and note:
        sys.stderr.write(f"{PROGRAM}: {SHIPPED_CHECKPOINT_NOTE} Choose another with --model.\n")
    return loaded


def _load_model(source: str, dtype: str, device_name: str | None = None) -> tuple[Any, Any]:
    """Load model and processor onto a device; by default, onto the default device."""
    from .. import FlashSlothForConditionalGeneration, FlashSlothProcessor
    from .devices import choose_device, working_dtype

    _silence_transformers()
    try:
        device = choose_device(device_name)
    except ValueError as error:
        raise CommandError(error) from error
    check_model(source)
    dtype = working_dtype(device) if dtype == "auto" else dtype
    try:
        processor = FlashSlothProcessor.from_pretrained(source)
        model, report = FlashSlothForConditionalGeneration.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # transformers, huggingface_hub, safetensors and tokenizers share no class
        raise CommandError(f"{source} cannot be loaded: {first_line(error)}") from error
    if missing := report["missing_keys"]:
        raise CommandError(f"{source} is not complete: {len(missing)} tensors are missing, such as {min(missing)}.")
    return model.to(device).eval(), processor


def check_model(source: str) -> None:
    """Check that a folder or Hub id is a FlashSloth, and that a folder is complete, without loading the weights.

    Args:
        source: Folder or Hub id, in the layout of this package or of the original releases.

    Raises:
        CommandError: If it is not a FlashSloth, is incomplete, or does not exist.
    """
    from ..configuration_flashsloth import is_flashsloth_config
    from .repository import check_json_files, find_weight_files

    config = _read_config(source)
    if not is_flashsloth_config(config):
        kind = f"model_type is {config.get('model_type')!r}, its `architectures` {config.get('architectures')!r}"
        raise CommandError(f"{source} is not a FlashSloth: its {kind}.")
    if Path(source).is_dir():
        try:
            find_weight_files(Path(source))
            check_json_files(Path(source))
        except ValueError as error:
            raise CommandError(f"{source} cannot be loaded: {first_line(error)}") from error


def _read_config(source: str) -> dict:
    from transformers.configuration_utils import PreTrainedConfig

    from .repository import read_json

    file = Path(source, "config.json")
    try:
        if Path(source).is_dir():
            return read_json(file)
        return PreTrainedConfig.get_config_dict(source)[0]
    except Exception as error:  # huggingface_hub has no common class for no such repository, no access, no network
        if file.exists():
            raise CommandError(f"{source} cannot be loaded: {first_line(error)}") from error
        if source == str(SHIPPED_CHECKPOINT):
            raise CommandError(
                f"the demonstration checkpoint is not in {source}; choose another one with --model."
            ) from error
        is_folder = Path(source).is_dir()
        reason = "it has no config.json" if is_folder else "neither a folder nor a Hub id that can be reached"
        raise CommandError(f"no such model: {source} ({reason})") from error


def _build_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class AnswerStreamer(TextStreamer):
        """Writes an answer while it is generated, without leading white space."""

        has_begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Write text that later tokens cannot change.

            Args:
                text: The next characters.
                stream_end: Whether these are the last ones.
            """
            text = text if self.has_begun else text.lstrip()
            self.has_begun = self.has_begun or bool(text)
            sys.stdout.write(text + "\n" * stream_end)
            sys.stdout.flush()

    return AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _silence_transformers(*, show_progress: bool = False) -> None:
    """Keep the libraries' log messages, and by default their progress bars, out of the terminal.

    Downloads always show their progress in a terminal.
    """
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not show_progress:
        logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Make SIGTERM raise, as Ctrl-C does, so that a command removes unfinished output."""

    def leave(number: int, _frame: Any) -> None:
        sys.exit(EXIT_SIGNAL + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(error: object) -> None:
    sys.stderr.write(f"{PROGRAM}: error: {error}\n")


def _positive_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")


def _not_negative_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")


def first_line(error: object) -> str:
    """First line of an error's message, with the error's type if the message is empty or unclear without it."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):  # a heading, such as "Validation error for field 'hidden_size':"
        first = f"{first} {rest.strip().partition(chr(10))[0]}".strip()
    name = type(error).__name__
    return f"{name}: {first}" if isinstance(error, (LookupError, AttributeError)) else first or name
