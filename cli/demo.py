"""A browser chat about an image, with heat maps of what the model looked at: `flashsloth demo`, and a Space's `app.py`.

An image is encoded once for any number of questions. The demo downloads nothing except a model given by its Hub id.
"""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # it would store visitors' images and contact the Hub

from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from ..image_processing_flashsloth import IMAGE_ERRORS
from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from ..saliency_flashsloth import overlay
from . import DEFAULT_MAX_NEW_TOKENS, SHIPPED_CHECKPOINT, SHIPPED_CHECKPOINT_NOTE
from .conversation import StopWhen, count_free_positions, encode_turns

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the demo needs Gradio: pip install gradio") from error

MAX_QUESTION_LENGTH = 100_000  # characters; rejects texts that would take long to tokenize and exceed the context
MAX_FILE_SIZE = "32mb"
PROGRAMS = ("EPS",)  # formats that Pillow renders with an external program
SHOWN_SIDE = 640  # pixels, of the longer side of a heat map
DELETE_FILES = (600, 3600)  # seconds: interval of the cleanup, and minimum age of the files that it deletes
SECONDS_TO_STOP = 30
SHOWN_LENGTH = 300  # characters, of a rejected question
SYSTEM_FONTS = ("system-ui", "sans-serif")
VIEWS = ("What the answer depends on", "What the queries attended to", "How patches were pooled")
EXPLANATION = """
The first map highlights the patches that the **answer** depends on most (gradient of its probability), the second those
that the **queries** after the question attended to (attention of the Embedded Query module), and the third those that
**pooling** put into the image tokens, regardless of the question.
"""
EXAMPLES = [
    ("scene.png", "Read the sign."),
    ("scene.png", "What is in the top right corner?"),
    ("scene.png", "Is there a dog?"),
    ("shapes.png", "Describe the picture."),
]
STYLE = """
.gradio-container { max-width: 1200px !important; margin: auto !important; }
footer { display: none !important; }
#about p { margin: 0; }
@media (max-width: 640px) {
    #about p { font-size: 0.85rem; line-height: 1.35; }
    #image { height: 160px !important; }
    #chat { height: 150px !important; }
}
"""

logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """A question, its answer, and a heat map over the image for each of `VIEWS`."""

    question: str
    answer: str
    views: list[Image.Image]


class Page(gr.Blocks):
    """A page that reads only files that visitors have uploaded.

    Gradio itself reads any server path that a request names without Gradio's marker `meta`, and downloads any URL.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Check all files in the inputs of an event before they are read.

        Raises:
            gr.Error: If a file was not uploaded.
        """
        folder = Path(self.GRADIO_CACHE).resolve()
        if not all(_is_in(folder, path) for path in _paths(inputs)):
            raise gr.Error("This file was not uploaded. Please upload it first.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _paths(node: Any) -> Iterator[Any]:
    """All values in a request's data that could be interpreted as file paths."""
    if isinstance(node, dict):
        if node.get("path") is not None:
            yield node["path"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _paths(item)


def _is_in(folder: Path, path: Any) -> bool:
    try:
        return Path(path).resolve().is_relative_to(folder)
    except (TypeError, ValueError, OSError):  # not a path
        return False


class ImageInput(gr.Image):
    """An image input that keeps the image's mode, and shows a message for files that are not images."""

    is_template = True  # the browser sees a gr.Image

    def preprocess(self, payload: Any) -> Image.Image | None:
        """Open the image.

        Raises:
            gr.Error: If it cannot be read.
        """
        try:
            image = super().preprocess(payload)
            if image is not None:
                if image.format in PROGRAMS:
                    raise ValueError(image.format)
                image.load()
                image.filename = ""  # a server path, which error messages would show
        except IMAGE_ERRORS as error:
            text = "This file cannot be read as an image. Please choose another one."
            raise gr.Error(text, print_exception=False) from error
        return image


class Answering(threading.Thread):
    """Generates in a separate thread, while `streamer` is read."""

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        tokenizer: Any,
        image: Image.Image,
        inputs: dict,
        **kwargs: Any,
    ) -> None:
        super().__init__(daemon=True)
        self.streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = threading.Event()
        self.model, self.image, self.inputs, self.settings = model, image, inputs, kwargs
        self.output: Any = None
        self.error: Exception | None = None
        self.is_unwanted = False
        self.is_shown = threading.Event()

    def run(self) -> None:
        """Generate, and store an error for the reader of the stream."""
        try:
            self.output = self.model.generate(
                **self.inputs,
                **self.settings,
                streamer=self.streamer,
                stopping_criteria=StoppingCriteriaList([StopWhen(self.stop)]),
            )
        except Exception as error:
            self.error = error
        finally:
            self.streamer.end()


class Sampling(NamedTuple):
    """Generation settings.

    Attributes:
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Sample from the most likely tokens whose probabilities sum to this.
        max_new_tokens: Maximum length of an answer.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def options(self, room: int) -> dict[str, Any]:
        """Arguments of `generate` for an answer of at most `room` tokens."""
        options: dict[str, Any] = {"max_new_tokens": min(int(self.max_new_tokens), room)}
        if self.temperature > 0:
            return {**options, "do_sample": True, "temperature": float(self.temperature), "top_p": float(self.top_p)}
        return {**options, "do_sample": False}


class Demo:
    """The chat, for any number of concurrent visitors.

    Args:
        model: A FlashSloth.
        processor: Its processor.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model.eval(), processor, max_new_tokens
        self.images = model.image_prefix_cache()
        self.answering: dict[str | None, Answering] = {}  # by visitor

    def ask(
        self,
        image: Image.Image | None,
        question: str,
        splitting: bool,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        turns: list[Turn],
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Stream the answer to a question, then show its heat maps.

        Yields:
            Chat, question box, stop button, turns, choice of question, and the heat maps.
        """
        question = (question or "").strip()
        if image is None or not question:
            missing = "Please choose an image first." if image is None else "Please type a question first."
            gr.Warning(missing)
            yield _unchanged()
            return
        try:
            inputs = self.images(self._inputs(image, question, splitting, turns))
            options = Sampling(temperature, top_p, max_new_tokens).options(
                count_free_positions(self.model, inputs["input_ids"])
            )
        except ValueError as error:  # such as an image of 70000 x 1 pixels, or a question that is too long
            yield _rejected(turns, question, str(error))
            return
        answering = Answering(
            self.model,
            self.processor.tokenizer,
            image,
            inputs,
            output_attentions=True,
            return_dict_in_generate=True,
            **options,
        )
        self.answering[request.session_hash] = answering
        try:
            yield from self._show(question, turns, answering)
            yield _unchanged()  # Gradio sends the last update twice, and the chat may have been cleared meanwhile
            if answering.is_unwanted:  # the browser may show the end of the answer after the cleared chat
                chat, *others = _cleared()
                yield (chat, gr.skip(), _stop_button(False), *others)
        finally:  # also if the visitor has left
            answering.stop.set()
            answering.join()
            self.answering.pop(request.session_hash, None)
            answering.is_shown.set()

    def _show(self, question: str, turns: list[Turn], answering: Answering) -> Iterator[tuple]:
        answer = ""
        answering.start()
        yield (_chat(turns, question), "", _stop_button(True), *(gr.skip() for _ in range(2 + len(VIEWS))))
        for piece in answering.streamer:
            if answering.is_unwanted:
                return
            answer += piece
            yield (_chat(turns, question, answer), *(gr.skip() for _ in range(4 + len(VIEWS))))
        answering.join()
        if answering.is_unwanted:
            return
        try:
            if answering.error is not None:
                raise answering.error
            views = self._views(answering)
        except Exception:  # the message may contain server paths
            logger.exception("A question could not be answered.")
            yield _rejected(turns, question, "The model could not answer. Please try again, or ask something else.")
            return
        turns = [*turns, Turn(question, answer.strip(), views)]
        names = [f"{number}. {turn.question}" for number, turn in enumerate(turns, start=1)]
        choice = gr.Dropdown(choices=names, value=names[-1], visible=len(turns) > 1)
        yield (_chat(turns), gr.skip(), _stop_button(False), turns, choice, *turns[-1].views)

    def stop(self, request: gr.Request) -> None:
        """Stop the visitor's current answer."""
        answering = self.answering.get(request.session_hash)
        if answering is not None:
            answering.stop.set()

    def clear(self, request: gr.Request) -> list[Any]:
        """Clear the chat, the image and the question box."""
        return [None, "", *self.clear_chat(request)]

    def clear_chat(self, request: gr.Request) -> list[Any]:
        """Clear the chat, after stopping and discarding the visitor's current answer, if any."""
        answering = self.answering.get(request.session_hash)
        if answering is not None:
            answering.is_unwanted = True
            answering.stop.set()
            answering.is_shown.wait(timeout=SECONDS_TO_STOP)
        return _cleared()

    def change_image(self, image: Image.Image | None, request: gr.Request) -> list[Any]:
        """Clear the chat for a new image, unless the visitor has already asked about that image."""
        answering = self.answering.get(request.session_hash)
        if answering is not None and answering.image == image:
            return [gr.skip() for _ in range(3 + len(VIEWS))]
        return self.clear_chat(request)

    def _inputs(self, image: Image.Image, question: str, splitting: bool, turns: list[Turn]) -> dict[str, Any]:
        if len(question) > MAX_QUESTION_LENGTH:
            raise ValueError(
                f"This question is too long: it has {len(question)} characters, and {MAX_QUESTION_LENGTH} are allowed. "
                "Please shorten it."
            )
        asked = [(turn.question, turn.answer) for turn in turns]
        return encode_turns(self.processor, [image], asked, question, splitting).to(self.model.device, self.model.dtype)

    def _views(self, answering: Answering) -> list[Image.Image]:
        inputs, output = answering.inputs, answering.output
        shown = answering.image.convert("RGB")
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        sizes = [(shown.height, shown.width)]
        looked = self.model.heat_maps(output, inputs["input_ids"], sizes)
        answered = self.model.answer_maps(inputs, output.sequences, sizes)
        return [overlay(shown, heat) for heat in (answered[0], looked.questions[-1][0], looked.pooling[0])]

    def _about(self) -> str:
        """Description of the demo, and the model's name."""
        name = self.model.name_or_path
        if Path(name).resolve() == SHIPPED_CHECKPOINT.resolve():
            model = f"FlashSloth's shipped checkpoint. {SHIPPED_CHECKPOINT_NOTE}"
        else:
            model = f"{Path(name).resolve().name if Path(name).is_dir() else name}."
        return f"Ask a question about an image, and see what the model looked at.  \n**Model**: {model}"

    def build(self) -> gr.Blocks:
        """Build the page."""
        with Page(title="FlashSloth", analytics_enabled=False, delete_cache=DELETE_FILES) as page:
            turns = gr.State([])
            gr.Markdown("# FlashSloth")
            gr.Markdown(self._about(), elem_id="about")
            with gr.Row():
                with gr.Column(min_width=300):
                    image = ImageInput(
                        type="pil",
                        image_mode=None,
                        sources=["upload", "webcam", "clipboard"],
                        webcam_options=gr.WebcamOptions(mirror=False),  # mirrored text would be unreadable
                        label="Image",
                        height=340,
                        elem_id="image",
                    )
                with gr.Column(min_width=300):
                    chat = gr.Chatbot(height=340, label="Chat", feedback_options=None, buttons=[], elem_id="chat")
            question = gr.Textbox(
                placeholder="Ask a question about the image …",
                label="Question",
                show_label=False,
                max_lines=4,
                elem_id="question",
            )
            with gr.Row():
                send = gr.Button("Ask", variant="primary", min_width=80, elem_id="send")
                stop = gr.Button("Stop", min_width=80, interactive=False, elem_id="stop")
                clear = gr.Button("Clear", min_width=80, elem_id="clear")
            settings = self._settings()
            folder = SHIPPED_CHECKPOINT / "examples"
            examples = [[str(folder / name), text] for name, text in EXAMPLES if (folder / name).is_file()]
            if examples:
                gr.Examples(examples, [image, question], elem_id="examples", api_visibility="private")
            choice, views = _views_of_answers()

            cleared = [chat, turns, choice, *views]
            quiet = {"show_progress": "hidden", "api_visibility": "private"}
            asked = [send.click, question.submit]
            shown = [chat, question, stop, turns, choice, *views]
            gr.on(asked, self.ask, [image, question, *settings, turns], shown, **quiet)
            stop.click(self.stop, queue=False, **quiet)
            clear.click(self.clear, None, [image, question, *cleared], **quiet)
            chat.clear(self.clear_chat, None, cleared, **quiet)
            image.change(self.change_image, image, cleared, **quiet)
            image.upload(lambda image: None, image, None, **quiet)  # rejects files that are not images
            choice.input(lambda index, turns: turns[index].views, [choice, turns], views, **quiet)
        return page

    def _settings(self) -> list[gr.components.Component]:
        """Build the inputs for image splitting and sampling."""
        defaults = self.model.generation_config
        splitting = gr.Checkbox(
            self.processor.image_processor.do_image_splitting,
            label="High resolution",
            info="Splits the image into five tiles: better for small text and details, but slower.",
            elem_id="splitting",
        )
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            temperature = gr.Slider(
                0,
                2,
                (defaults.temperature or 1) if defaults.do_sample else 0,
                step=0.05,
                label="Temperature",
                info="0: always the most likely word. Higher values: more varied, but less reliable.",
                elem_id="temperature",
            )
            top_p = gr.Slider(
                0.05,
                1,
                defaults.top_p or 1,
                step=0.05,
                label="Top-p",
                info="With a temperature above 0: lower values exclude unlikely words.",
                elem_id="top-p",
            )
            length = gr.Slider(
                1,
                self.max_new_tokens,
                self.max_new_tokens,
                step=1,
                label="Maximum answer length, in tokens",
                elem_id="length",
            )
        return [splitting, temperature, top_p, length]


def _views_of_answers() -> tuple[gr.Dropdown, list[gr.Image]]:
    """Build the choice of a question, and its heat maps."""
    gr.Markdown("## What the model looked at")
    choice = gr.Dropdown([], type="index", label="Question", visible=False, elem_id="choice")
    views = []
    with gr.Row():
        for number, name in enumerate(VIEWS):
            with gr.Column(min_width=240):
                gr.Markdown(f"**{name}**")  # the image's own label would cover its corner
                view = gr.Image(
                    label=name,
                    show_label=False,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id=f"view{number}",
                )
                views.append(view)
    gr.Markdown(EXPLANATION)
    return choice, views


def _cleared() -> list[Any]:
    return [[], [], gr.Dropdown([], visible=False), *(None for _ in VIEWS)]


def _unchanged() -> tuple:
    return tuple(gr.skip() for _ in range(5 + len(VIEWS)))


def _rejected(turns: list[Turn], question: str, reason: str) -> tuple:
    """Show why a question has no answer. It stays in its box for correction, and is not part of the conversation."""
    shown = question if len(question) <= SHOWN_LENGTH else f"{question[:SHOWN_LENGTH]} …"
    return (
        _chat(turns, shown, f"⚠️ {reason}"),
        question,
        _stop_button(False),
        *(gr.skip() for _ in range(2 + len(VIEWS))),
    )


def _stop_button(is_active: bool) -> gr.Button:
    return gr.Button(interactive=is_active)


def _chat(turns: list[Turn], *last: str) -> list[dict[str, str]]:
    texts = [text for turn in turns for text in (turn.question, turn.answer)] + list(last)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def launch(demo: Demo, **kwargs: Any) -> gr.Blocks:
    """Serve the demo with the visitor's system fonts; see `gr.Blocks.launch`."""
    page = demo.build()
    theme = gr.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",))
    options = {"max_file_size": MAX_FILE_SIZE, "enable_monitoring": False, "show_error": False}
    page.launch(theme=theme, css=STYLE, **(options | kwargs))
    return page
