"""A chat about an image in the browser, which shows what the model looked at. It is also the `app.py` of a Space.

python examples/demo.py [--model FOLDER_OR_ID]

An image is encoded once, whatever the number of questions. Nothing is fetched from other hosts but the model, if it is
given by a Hub id.
"""

import argparse
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # which would keep visitors' images, and talk to the Hub

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import flashsloth
from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import SHIPPED_CHECKPOINT_NOTE
from flashsloth.cli.devices import working_dtype
from flashsloth.image_processing_flashsloth import IMAGE_ERRORS
from flashsloth.saliency_flashsloth import overlay

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo needs Gradio; install it with `pip install "flashsloth[demo]"`.') from error

SHIPPED_CHECKPOINT = Path(flashsloth.__file__).parent
MAX_NEW_TOKENS = 512
MAX_QUESTION_LENGTH = 100_000  # characters; a question that the model can read is shorter
MAX_FILE_SIZE = "32mb"
PROGRAMS = ("EPS",)  # formats of which Pillow has another program make an image
SHOWN_SIDE = 640  # pixels of the longer side of a heat map
DELETE_FILES = (600, 3600)  # seconds: how often, and how old an upload or a map must be
SECONDS_TO_STOP = 30
SHOWN_LENGTH = 300  # characters of a refused question
SYSTEM_FONTS = ("system-ui", "sans-serif")
VIEWS = ("What the answer depends on", "Where the queries looked", "How patches were pooled")
EXPLANATION = """
One map for each way from the image to the answer: the **answer** depends on the glowing patches most (gradient of its
probability), the **queries** behind the question read them (attention of the Embedded Query module), and **pooling**
took them into the image tokens, whatever the question.
"""
EXAMPLES = [
    ("scene.png", "Read the sign."),
    ("shapes.png", "Describe the picture."),
    ("shapes.png", "Where is the star?"),
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
    """A question, its answer, and the image with what the model looked at, one for each of `VIEWS`."""

    question: str
    answer: str
    views: list[Image.Image]


class Page(gr.Blocks):
    """A page that reads no file but what visitors have uploaded.

    Gradio itself reads any path of the server that comes without its mark, `meta`, and downloads what comes as a URL.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Check the files among the inputs of an event before anything reads them.

        Raises:
            gr.Error: If one was not uploaded.
        """
        folder = Path(self.GRADIO_CACHE).resolve()
        if not all(_is_in(folder, path) for path in _paths(inputs)):
            raise gr.Error("This file was not uploaded here. Please upload it.", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _paths(node: Any) -> Iterator[Any]:
    """Everything in the data of a request that could be taken for the path of a file."""
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
    except (TypeError, ValueError, OSError):  # no path at all
        return False


class ImageInput(gr.Image):
    """An image to upload or to take, in its own mode; what is no image is refused in words."""

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
                image.filename = ""  # the server's, which errors would show
        except IMAGE_ERRORS as error:
            text = "This file is not an image that can be read. Please choose another one."
            raise gr.Error(text, print_exception=False) from error
        return image


class StopWhen(StoppingCriteria):
    """Ends an answer as soon as an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Whether the rows of `input_ids` are done, `(batch,)`."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Answering(threading.Thread):
    """Generates in a thread of its own, while `streamer` is read."""

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
        """Generate; what goes wrong is kept for whoever reads."""
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
    """How words are chosen.

    Attributes:
        temperature: 0 always takes the likeliest word.
        top_p: Only the likeliest words are drawn from, which together have this probability.
        max_new_tokens: Longest answer.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def options(self, room: int) -> dict[str, Any]:
        """Arguments of `generate`, with `room` tokens left for the answer."""
        options: dict[str, Any] = {"max_new_tokens": min(int(self.max_new_tokens), room)}
        if self.temperature > 0:
            return {**options, "do_sample": True, "temperature": float(self.temperature), "top_p": float(self.top_p)}
        return {**options, "do_sample": False}


class Demo:
    """The chat, for any number of visitors.

    Args:
        model: A FlashSloth.
        processor: Its processor.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        max_new_tokens: int = MAX_NEW_TOKENS,
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
        """Answer a question while the answer grows; then show what the model looked at.

        Yields:
            Chat, question box, stop button, turns, choice of question, and the views.
        """
        question = (question or "").strip()
        if image is None or not question:
            missing = "Please choose an image first." if image is None else "Please type a question first."
            gr.Warning(missing)
            yield _unchanged()
            return
        try:
            inputs = self.images(self._inputs(image, question, splitting, turns))
            options = Sampling(temperature, top_p, max_new_tokens).options(self._room(inputs))
        except ValueError as error:  # such as an image of 70000 x 1 pixels, or a question that is too long
            yield _refused(turns, question, str(error))
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
            yield _unchanged()  # Gradio sends the last update twice, and the chat may have been emptied meanwhile
            if answering.is_unwanted:  # the browser may draw the emptied chat before the last words of the answer
                chat, *others = _emptied()
                yield (chat, gr.skip(), _stop_button(False), *others)
        finally:  # also if the visitor went away
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
        except Exception:  # its words may name the server's folders
            logger.exception("A question could not be answered.")
            yield _refused(turns, question, "The model could not answer. Please try again, or ask something else.")
            return
        turns = [*turns, Turn(question, answer.strip(), views)]
        names = [f"{number}. {turn.question}" for number, turn in enumerate(turns, start=1)]
        choice = gr.Dropdown(choices=names, value=names[-1], visible=len(turns) > 1)
        yield (_chat(turns), gr.skip(), _stop_button(False), turns, choice, *turns[-1].views)

    def stop(self, request: gr.Request) -> None:
        """End the answer that a visitor is waiting for."""
        answering = self.answering.get(request.session_hash)
        if answering is not None:
            answering.stop.set()

    def clear(self, request: gr.Request) -> list[Any]:
        """Forget everything: the image and what is typed as well."""
        return [None, "", *self.begin_anew(request)]

    def begin_anew(self, request: gr.Request) -> list[Any]:
        """Forget the answer that a visitor is waiting for, if any; gives an empty chat, when nothing of it can come."""
        answering = self.answering.get(request.session_hash)
        if answering is not None:
            answering.is_unwanted = True
            answering.stop.set()
            answering.is_shown.wait(timeout=SECONDS_TO_STOP)
        return _emptied()

    def look_at(self, image: Image.Image | None, request: gr.Request) -> list[Any]:
        """Begin anew with another image; a visitor may be quicker, and have asked about it before this is called."""
        answering = self.answering.get(request.session_hash)
        if answering is not None and answering.image == image:
            return [gr.skip() for _ in range(3 + len(VIEWS))]
        return self.begin_anew(request)

    def _inputs(self, image: Image.Image, question: str, splitting: bool, turns: list[Turn]) -> dict[str, Any]:
        if len(question) > MAX_QUESTION_LENGTH:
            raise ValueError(f"This question has {len(question)} characters; the model cannot read so many.")
        messages = []
        for text, *answer in [*((turn.question, turn.answer) for turn in turns), (question,)]:
            messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
            messages += [{"role": "assistant", "content": [{"type": "text", "text": part}]} for part in answer]
        messages[0]["content"].insert(0, {"type": "image", "image": image})
        return self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images_kwargs": {"do_image_splitting": splitting}},
        ).to(self.model.device, self.model.dtype)

    def _room(self, inputs: dict[str, Any]) -> int:
        """Tokens that are left for the answer.

        Raises:
            ValueError: If there are none.
        """
        num_tokens = inputs["input_ids"].shape[1]
        num_positions = self.model.config.text_config.max_position_embeddings
        if num_tokens >= num_positions:
            raise ValueError(
                f"This conversation is longer than the model can read: it has {num_tokens} tokens, and with the answer "
                f"{num_positions} are possible. Please shorten the question, or press Clear and begin a new chat."
            )
        return num_positions - num_tokens

    def _views(self, answering: Answering) -> list[Image.Image]:
        inputs, output = answering.inputs, answering.output
        shown = answering.image.convert("RGB")
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        sizes = [(shown.height, shown.width)]
        looked = self.model.heat_maps(output, inputs["input_ids"], sizes)
        answered = self.model.answer_maps(inputs, output.sequences, sizes)
        return [overlay(shown, heat) for heat in (answered[0], looked.questions[-1][0], looked.pooling[0])]

    def _about(self) -> str:
        """What this is, and which model answers."""
        name = self.model.name_or_path
        if Path(name).resolve() == SHIPPED_CHECKPOINT.resolve():
            model = f"FlashSloth's shipped checkpoint. {SHIPPED_CHECKPOINT_NOTE}"
        else:
            model = f"{Path(name).resolve().name if Path(name).is_dir() else name}."
        return f"Ask about an image, and see what the model looked at.  \n**Model**: {model}"

    def build(self) -> gr.Blocks:
        """Lay out the page."""
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
                        webcam_options=gr.WebcamOptions(mirror=False),  # or signs could not be read
                        label="Image",
                        height=340,
                        elem_id="image",
                    )
                with gr.Column(min_width=300):
                    chat = gr.Chatbot(height=340, label="Chat", feedback_options=None, buttons=[], elem_id="chat")
            question = gr.Textbox(
                placeholder="Ask about the image …",
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
            folder = Path(__file__).parent
            examples = [[str(folder / name), text] for name, text in EXAMPLES if (folder / name).is_file()]
            if examples:
                gr.Examples(examples, [image, question], elem_id="examples", api_visibility="private")
            choice, views = _views_of_answers()

            emptied = [chat, turns, choice, *views]
            quiet = {"show_progress": "hidden", "api_visibility": "private"}
            asked = [send.click, question.submit]
            shown = [chat, question, stop, turns, choice, *views]
            gr.on(asked, self.ask, [image, question, *settings, turns], shown, **quiet)
            stop.click(self.stop, queue=False, **quiet)
            clear.click(self.clear, None, [image, question, *emptied], **quiet)
            chat.clear(self.begin_anew, None, emptied, **quiet)
            image.change(self.look_at, image, emptied, **quiet)
            image.upload(lambda image: None, image, None, **quiet)  # refuses what is no image
            choice.input(lambda index, turns: turns[index].views, [choice, turns], views, **quiet)
        return page

    def _settings(self) -> list[gr.components.Component]:
        """Lay out what a visitor may set: the tiles, and how words are chosen."""
        defaults = self.model.generation_config
        splitting = gr.Checkbox(
            self.processor.image_processor.do_image_splitting,
            label="Look closer",
            info="Reads small print and finds small things; takes longer.",
            elem_id="high",
        )
        with gr.Accordion("How words are chosen", open=False, elem_id="sampling"):
            temperature = gr.Slider(
                0,
                2,
                (defaults.temperature or 1) if defaults.do_sample else 0,
                step=0.05,
                label="Temperature",
                info="0 always takes the likeliest word; more is more various, and less reliable.",
                elem_id="temperature",
            )
            top_p = gr.Slider(
                0.05,
                1,
                defaults.top_p or 1,
                step=0.05,
                label="Top-p",
                info="With a temperature above 0: leaves out unlikely words.",
                elem_id="top-p",
            )
            length = gr.Slider(
                1, self.max_new_tokens, self.max_new_tokens, step=1, label="Longest answer, in tokens", elem_id="length"
            )
        return [splitting, temperature, top_p, length]


def _views_of_answers() -> tuple[gr.Dropdown, list[gr.Image]]:
    """Lay out the choice of a question, and what the model looked at for it."""
    gr.Markdown("## What the model looked at")
    choice = gr.Dropdown([], type="index", label="Question", visible=False, elem_id="choice")
    views = []
    with gr.Row():
        for number, name in enumerate(VIEWS):
            with gr.Column(min_width=240):
                gr.Markdown(f"**{name}**")  # a label of the image would hide its corner
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


def _emptied() -> list[Any]:
    return [[], [], gr.Dropdown([], visible=False), *(None for _ in VIEWS)]


def _unchanged() -> tuple:
    return tuple(gr.skip() for _ in range(5 + len(VIEWS)))


def _refused(turns: list[Turn], question: str, reason: str) -> tuple:
    """Show why a question has no answer; it stays in its box to be mended, and is not part of the conversation."""
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
    """Serve the demo; see `gr.Blocks.launch`. Its fonts are those of the visitor's system."""
    page = demo.build()
    theme = gr.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",))
    options = {"max_file_size": MAX_FILE_SIZE, "enable_monitoring": False, "show_error": False}
    page.launch(theme=theme, css=STYLE, **(options | kwargs))
    return page


def main() -> None:
    """Load the model, and serve the demo until it is interrupted."""
    parser = argparse.ArgumentParser(description="Chat about an image in the browser.")
    parser.add_argument("--model", default=str(SHIPPED_CHECKPOINT), help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--host", help="address to serve on (default: this machine only); 0.0.0.0 for all")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public address")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FlashSlothForConditionalGeneration.from_pretrained(options.model, dtype=working_dtype(device)).to(device)
    demo = Demo(model, FlashSlothProcessor.from_pretrained(options.model), options.max_new_tokens)
    launch(demo, server_name=options.host, server_port=options.port, share=options.share)


if __name__ == "__main__":
    main()
