"""`flashsloth init` keeps pretrained weights unchanged, uses the decoder's chat format, and finds questions in it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_models import TOKENIZERS, make_decoder, make_tokenizer, make_tower
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from original_checkpoint import make_original
from PIL import Image
from processes import run_alone
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    GenerationConfig,
    GPT2Config,
)
from transformers.utils.chat_template_utils import render_jinja_template

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothImageProcessor,
    FlashSlothProcessor,
    cli,
)
from flashsloth.cli.chat_format import CONTENTS, ChatFormatError, derive_template, find_instruction_starts
from flashsloth.cli.init import _adapt_tokenizer, default_pooling_window, init
from flashsloth.cli.model_card import build_model_card
from flashsloth.cli.repository import RepositoryError
from flashsloth.modeling_flashsloth import PromptSpans

WIDTH = 32  # of the Embedded Query module: with 576, it would be the largest part
PAIRS = {  # decoder: (tower, decoder's spare rows, pooling window)
    "phi": ("siglip_vision_model", 8, 2),
    "qwen3": ("clip", 8, 4),
    "llama": ("dinov2", 0, None),
    "gemma3_text": ("siglip_vision_model", 1, 2),
    "lfm2": ("siglip_vision_model", 8, 4),  # its convolution layers have a state of their own
}
SENTINEL = "\ue000"
ASK = """
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
messages = torch.load(sys.argv[1], weights_only=False)
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.encode_conversations(messages)
    torch.save(model.generate(**inputs, max_new_tokens=5), folder + ".pt")
"""


MEMORY = """
import re, sys
from pathlib import Path
from flashsloth.cli.init import init

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

before = peak()
done = init(*sys.argv[1:], query_hidden_size=32)
print((peak() - before) / (4 * done.num_parameters))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of all towers and decoders, and their models by name."""
    folder = tmp_path_factory.mktemp("bases")
    models = {}
    for decoder, (tower, spare_rows, _) in PAIRS.items():
        models[decoder] = make_decoder(folder / decoder, decoder, spare_rows=spare_rows)
        models[tower] = make_tower(folder / tower, tower)
    return folder, models


@pytest.fixture(scope="module")
def built(bases, tmp_path_factory):
    """Result, model and processor that `init` made from each pair, by decoder."""
    folder, _ = bases
    output = tmp_path_factory.mktemp("built")
    made = {}
    for decoder, (tower, _, window) in PAIRS.items():
        done = init(
            folder / tower, folder / decoder, output / decoder, pooling_window_size=window, query_hidden_size=WIDTH
        )
        model, report = FlashSlothForConditionalGeneration.from_pretrained(done.output, output_loading_info=True)
        assert not any(report.values())
        made[decoder] = (done, model, FlashSlothProcessor.from_pretrained(done.output))
    return made


@pytest.fixture(scope="module")
def adapted():
    """By family: the decoder's tokenizer, and FlashSloth's tokenizer, chat template and instruction patterns."""
    found = {}
    for family in TOKENIZERS:
        tokenizer = make_tokenizer(family)
        template, _ = _adapt_tokenizer(tokenizer, None)
        found[family] = (make_tokenizer(family), tokenizer, template, find_instruction_starts(tokenizer, template))
    return found


def question(*images, text="What is it?"):
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def answer(text="A red circle."):
    return {"role": "assistant", "content": text}


def system(text="Be brief."):
    return {"role": "system", "content": text}


@pytest.mark.parametrize("family", PAIRS)
def test_pretrained_weights_are_unchanged(bases, built, family):
    _, models = bases
    state = built[family][1].state_dict()
    for name, tensor in models[family].get_decoder().state_dict().items():
        kept = state[f"model.language_model.{name}"]
        assert torch.equal(kept[: len(tensor)] if "embed_tokens" in name else kept, tensor), name
    for name, tensor in models[family].get_output_embeddings().state_dict().items():
        assert torch.equal(state[f"lm_head.{name}"][: len(tensor)], tensor), name
    tower = models[PAIRS[family][0]]
    tower = getattr(tower, "vision_model", tower).state_dict()
    names = [name for name in state if name.startswith("model.vision_tower.")]
    assert len(names) > 20
    for name in names:
        assert torch.equal(state[name], tower[name.removeprefix("model.vision_tower.")]), name


@pytest.mark.parametrize("family", PAIRS)
def test_logits_of_text_are_those_of_the_decoder(bases, built, family):
    ids = torch.arange(20, 30).unsqueeze(0)
    with torch.no_grad():
        expected = bases[1][family](ids).logits
        torch.testing.assert_close(built[family][1](ids).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("family", PAIRS)
def test_patch_features_are_the_input_of_the_towers_last_layer(bases, built, family):
    tower = bases[1][PAIRS[family][0]]
    tower = getattr(tower, "vision_model", tower)
    config, model = built[family][0].config, built[family][1]
    pixels = torch.randn(2, 3, config.vision_config.image_size, config.vision_config.image_size)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, -config.num_patches :]
        found = model.get_image_features(pixels)
    torch.testing.assert_close(found.last_hidden_state, expected)
    assert found.pooler_output.shape == (2, config.image_seq_length, config.text_config.hidden_size)


@pytest.mark.parametrize(("layer", "num_layers"), [(-1, 3), (-2, 2), (-3, 1), (1, 1)])
def test_the_vision_layer_can_be_chosen(bases, tmp_path, layer, num_layers):
    folder, models = bases
    done = init(folder / "clip", folder / "phi", tmp_path / "out", vision_layer=layer, query_hidden_size=WIDTH)
    model = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        states = models["clip"].vision_model(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, states[num_layers][:, 1:])


@pytest.mark.parametrize("family", PAIRS)
def test_the_vocabulary_grows_only_when_it_must(bases, built, family):
    decoder, (done, model, processor) = bases[1][family], built[family]
    old, new = (each.get_input_embeddings().weight for each in (decoder, model))
    needed = max(processor.tokenizer.get_vocab().values()) + 1
    assert len(new) == max(len(old), needed) == done.config.text_config.vocab_size
    assert done.num_new_rows == len(new) - len(old)
    _, spare_rows, _ = PAIRS[family]
    assert (done.num_new_rows == 0) == (spare_rows >= 3)
    if done.num_new_rows:
        for grown, first in ((new, old), (model.lm_head.weight, decoder.get_output_embeddings().weight)):
            torch.testing.assert_close(grown[len(first) :], first.mean(0).expand(done.num_new_rows, -1))


def test_the_weights_of_new_parts_depend_only_on_the_seed(bases, tmp_path):
    folder, _ = bases
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(states))
        init(folder / "dinov2", folder / "qwen3", tmp_path / name, query_hidden_size=WIDTH, seed=seed)
        states.append(FlashSlothForConditionalGeneration.from_pretrained(tmp_path / name).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    parts = {".".join(name.split(".")[:2]) for name in changed}
    assert parts == {
        f"model.{part}"
        for part in ("spatial_attention_pooling", "multi_modal_projector", "query_tokens", "embedded_query")
    }


@pytest.mark.slow
def test_all_repositories_answer_in_a_fresh_process_without_the_package(built, images, tmp_path):
    messages = [question(images[0]), answer(), question(images[1], text="And this?")]
    torch.save(messages, tmp_path / "messages.pt")
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    folders = [str(done.output) for done, _, _ in built.values()]
    run_alone(script, tmp_path / "messages.pt", *folders, folder=tmp_path)
    for folder, (_, model, processor) in zip(folders, built.values(), strict=True):
        inputs = processor.encode_conversations(messages)
        found = torch.load(f"{folder}.pt")
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=5))
        assert found.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", PAIRS)
def test_a_row_does_not_depend_on_its_batch(built, images, family):
    _, model, processor = built[family]
    conversations = [
        [question(images[0])],
        [question(text="No image.")],
        [question(images[1], images[2], text="Which?"), answer(), question(text="Sure?")],
    ]
    batch = processor.encode_conversations(conversations, padding=True)
    with torch.no_grad():
        together = model(**batch, logits_to_keep=1).logits
        alone = [model(**processor.encode_conversations(row), logits_to_keep=1).logits for row in conversations]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", PAIRS)
def test_answers_end_at_the_end_token_of_the_chat_format(built, family):
    done, model, processor = built[family]
    generation_config = GenerationConfig.from_pretrained(done.output)
    assert processor.tokenizer.eos_token == done.end_token
    assert generation_config.eos_token_id == processor.tokenizer.eos_token_id == model.config.text_config.eos_token_id
    assert generation_config.pad_token_id != generation_config.eos_token_id
    assert generation_config.suppress_tokens == [processor.image_token_id, processor.query_token_id]
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.query_token_id == processor.query_token_id
    expected = {"phi": "</s>", "qwen3": "<|im_end|>", "llama": "<|eot_id|>", "gemma3_text": "<end_of_turn>"}
    expected["lfm2"] = "<|im_end|>"
    assert done.end_token == expected[family]


@pytest.mark.parametrize("family", PAIRS)
def test_the_query_anchor_is_the_token_of_a_space_and_a_full_stop_if_there_is_one(built, family):
    done, _, processor = built[family]
    ids = processor.tokenizer.encode(" .", add_special_tokens=False)
    assert done.config.query_anchor_token_id == (ids[0] if len(ids) == 1 else None)


def test_images_are_normalized_with_the_towers_statistics(built):
    assert list(built["qwen3"][2].image_processor.image_mean) == [0.48, 0.46, 0.41]
    assert list(built["qwen3"][2].image_processor.image_std) == [0.27, 0.26, 0.28]
    assert list(built["llama"][2].image_processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(built["phi"][2].image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert built["phi"][2].image_processor.size == {"height": 64, "width": 64}


def conversations_of(has_system):
    turns = [question(text="One, two?\n\nThree."), answer("Yes:\n- a\n- b"), question(text="Why?"), answer("So.")]
    flat = [
        {"role": m["role"], "content": m["content"] if m["role"] == "assistant" else m["content"][0]["text"]}
        for m in turns
    ]
    for length, opening in itertools.product(range(1, 5), ([], [system()]) if has_system else ([],)):
        yield opening + flat[:length], length % 2 == 1


def without_thoughts(text):
    for thought in ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n"):
        text = text.replace(thought, "")
    return text


@pytest.mark.parametrize("family", [family for family in TOKENIZERS if family != "phi"])
def test_text_is_rendered_as_by_the_decoders_own_template(adapted, family):
    original, tokenizer, template, _ = adapted[family]
    has_system = family not in ("gemma", "mistral")
    for messages, is_question in conversations_of(has_system):
        expected = without_thoughts(
            original.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_question)
        )
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=is_question
        )
        assert found.count("<learnable>") == sum(message["role"] == "user" for message in messages)
        if family == "smollm3":  # its system block contains the current date, which we leave out
            expected = expected[expected.index("<|im_start|>user") :]
            opening = "<|im_start|>system\nBe brief.<|im_end|>\n" if messages[0]["role"] == "system" else ""
            assert found.startswith(opening)
            found = found.removeprefix(opening)
        assert found.replace("<learnable>", "") == expected


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_a_system_message_is_refused_where_the_format_has_none(adapted, family):
    _, tokenizer, template, _ = adapted[family]
    with pytest.raises(TemplateError, match="found system"):
        tokenizer.apply_chat_template([system(), question()], chat_template=template)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_answers_and_their_end_tokens_are_learned(adapted, family):
    _, tokenizer, template, _ = adapted[family]
    messages = [question(), answer("First."), question(text="More?"), answer("Second.")]
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    learned = [texts[0][start:end] for start, end in spans[0]]
    assert [text.removeprefix(" ") for text in learned] == [f"{t}{tokenizer.eos_token}" for t in ("First.", "Second.")]


def tiny_processor(tokenizer, template, starts):
    """A processor whose prompts have one image token and one query, and a config that finds them."""
    image_token_id, query_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<learnable>"])
    config = FlashSlothConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer) + 1},
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 64},
        pooling_window_size=2,
        num_query_tokens=1,
        query_anchor_token_id=None,
        instruction_start_ids=starts,
        image_token_id=image_token_id,
        query_token_id=query_token_id,
        num_query_heads=32,
    )
    processor = FlashSlothProcessor(
        FlashSlothImageProcessor(), tokenizer, chat_template=template, image_seq_length=1, num_query_tokens=1
    )
    return processor, config


@pytest.mark.slow
@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_question_is_found_whatever_its_first_characters_are(adapted, family):
    """A question starts at the first token with one of its characters, even if that token also has a line break."""
    _, tokenizer, template, starts = adapted[family]
    processor, config = tiny_processor(tokenizer, template, starts)
    config.validate_architecture()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    contents = [*CONTENTS, "What is it?", "\n", "  ", "user", "\n\nuser\n", "名前", *special, f"{special[-3]}user\nHi"]
    if family != "phi":  # its format is plain text
        contents += ["[INST] Hi", "USER: Hi"]
    befores = [[], [question(text="First"), answer("Second")]]
    if family != "mistral":  # it separates questions without an answer only by text
        befores += [[question(text="a"), answer("b"), question(text="c")]]
    if family not in ("gemma", "mistral"):
        befores += [[system()], [system("Speak 2 "), question(text="a"), answer("b")]]
    for before, images, content in itertools.product(befores, (0, 1, 2), contents):
        if family == "gemma3_text" and before[-1:] and before[-1]["role"] == "system" and not images:
            continue  # the system message is part of the first question
        text, head = (
            processor.apply_chat_template([*before, question(*[None] * images, text=text)])
            for text in (content, SENTINEL)
        )
        head = head.partition(SENTINEL)[0]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = PromptSpans(torch.tensor([encoded["input_ids"]]), config)
        block = max(i for i, token in enumerate(encoded["input_ids"]) if token == config.query_token_id)
        expected = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(head))
        assert spans.instruction_start[0, block] == expected, (before, images, content)
        assert spans.query_start[0, block] == block


def test_the_original_format_has_the_patterns_of_the_released_models(adapted):
    """Only the texts are compared: the ids depend on the tokenizer."""
    _, tokenizer, _, starts = adapted["phi"]
    texts = {tokenizer.decode(pattern) for pattern in starts}
    assert {"<image>\n", "USER:"} <= texts
    assert {text.replace("<image>", "").strip() for text in texts} == {"", "USER:"}


@pytest.mark.parametrize("family", [family for family in TOKENIZERS if family != "phi"])
def test_only_special_tokens_start_an_instruction(adapted, family):
    _, tokenizer, _, starts = adapted[family]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert starts
    assert all(special & set(pattern) for pattern in starts)


@pytest.mark.parametrize(
    ("grid", "window"),
    [
        *((27, 3), (24, 3), (14, 2), (16, 2), (32, 4), (7, 1), (18, 2), (64, 8), (1, 1)),
        *((4, 2), (5, 1), (6, 2), (8, 2), (9, 3), (10, 2), (12, 2), (15, 3), (2, 1), (3, 1), (13, 1)),
    ],
)
def test_the_pooling_window_makes_about_81_tokens(grid, window):
    assert default_pooling_window(grid) == window


def test_a_patch_grid_without_divisors_is_refused():
    with pytest.raises(RepositoryError, match=r"37x37.*--image-size"):
        default_pooling_window(37)


@pytest.mark.parametrize("family", ["siglip_vision_model", "clip", "dinov2"])
def test_positions_are_interpolated_for_another_image_size(bases, tmp_path, family):
    folder, models = bases
    done = init(
        folder / family, folder / "phi", tmp_path / "out", image_size=96, pooling_window_size=3, query_hidden_size=WIDTH
    )
    model = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    processor = FlashSlothProcessor.from_pretrained(done.output)
    assert done.config.num_patches == 144
    assert processor.image_processor.size == {"height": 96, "width": 96}
    pixels = torch.randn(1, 3, 96, 96)
    tower = getattr(models[family], "vision_model", models[family])
    kwargs = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True, **kwargs).hidden_states[-2][:, -144:]
        torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected)


def test_options_are_stored_in_the_config(bases, tmp_path):
    folder, _ = bases
    done = init(
        folder / "clip",
        folder / "qwen3",
        tmp_path / "out",
        query_layer_idx=3,
        num_query_tokens=5,
        query_hidden_size=16,
        do_image_splitting=True,
        dtype="bfloat16",
    )
    model = FlashSlothForConditionalGeneration.from_pretrained(done.output, dtype="auto")
    processor = FlashSlothProcessor.from_pretrained(done.output)
    assert (model.config.query_layer_idx, model.config.num_query_tokens, model.config.query_hidden_size) == (3, 5, 16)
    assert processor.num_query_tokens == 5
    assert processor.image_processor.do_image_splitting
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert done.dtype == "bfloat16"


def test_the_dtype_of_the_decoder_is_kept(tmp_path, bases):
    folder, _ = bases
    make_decoder(tmp_path / "half", "qwen3", spare_rows=8, dtype=torch.bfloat16)
    assert init(folder / "clip", tmp_path / "half", tmp_path / "out", query_hidden_size=WIDTH).dtype == "bfloat16"


def test_query_heads_divide_both_widths(tmp_path, bases):
    folder, _ = bases
    make_decoder(tmp_path / "odd", "qwen3", num_attention_heads=6, num_key_value_heads=3)
    done = init(folder / "clip", tmp_path / "odd", tmp_path / "out", query_hidden_size=24)
    assert done.config.num_query_heads == 4


def test_the_card_says_that_the_model_is_untrained_and_names_its_base_models(built):
    card = ModelCard.load(built["qwen3"][0].output / "README.md")
    assert "custom_code" in card.data.tags
    assert card.data.base_model is None  # a folder is not a Hub id
    assert card.data.license is None
    assert "clip" in card.text
    assert "train the model before you use it" in card.text
    card = build_model_card(
        built["phi"][0].config,
        name="mine",
        dtype="float16",
        num_parameters=1,
        do_image_splitting=False,
        base_models=["someone/decoder", "someone/tower"],
    )
    assert card.data.base_model == ["someone/decoder", "someone/tower"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_about_one_model_is_in_memory(bases, tmp_path):
    folder, _ = bases
    make_decoder(tmp_path / "large", "qwen3", hidden_size=1024, intermediate_size=8192, num_hidden_layers=2)
    arguments = [sys.executable, "-c", MEMORY, folder / "clip", tmp_path / "large", tmp_path / "out"]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.5


def test_a_towers_image_size_may_be_a_pair(bases, tmp_path):
    folder, _ = bases
    make_tower(tmp_path / "pairs", "dinov2", image_size=(40, 40), patch_size=(8, 8))
    done = init(tmp_path / "pairs", folder / "phi", tmp_path / "out", query_hidden_size=WIDTH)
    assert FlashSlothProcessor.from_pretrained(done.output).image_processor.size == {"height": 40, "width": 40}


@pytest.fixture
def run(capsys):
    def run_main(*arguments):
        capsys.readouterr()  # drop the output of earlier calls
        code = cli.main(["init", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def refused(run, bases, tmp_path):
    """`init` must fail with one line and exit code 2, and write nothing; returns the line."""

    def run_refused(*options, vision=None, language=None):
        folder, _ = bases
        before = sorted(tmp_path.rglob("*"))
        vision, language = vision or folder / "clip", language or folder / "qwen3"
        code, output, errors = run(
            tmp_path / "out", "--vision", vision, "--language", language, "--query-hidden-size", WIDTH, *options
        )
        assert (code, output, errors.count("\n")) == (2, "", 1), errors
        assert errors.startswith("flashsloth: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return errors

    return run_refused


def test_the_command_describes_the_new_model(run, bases, tmp_path):
    folder, _ = bases
    code, output, errors = run(
        tmp_path / "out", "--vision", folder / "clip", "--language", folder / "qwen3", "--query-hidden-size", WIDTH
    )
    assert (code, errors) == (0, "")
    assert "64 patches and 16 image tokens per tile" in output
    assert "<|im_end|>" in output
    image = tmp_path / "image.png"
    Image.radial_gradient("L").save(image)
    assert cli.main(["ask", str(image), "Why?", "--model", str(tmp_path / "out"), "--max-new-tokens", "2"]) == 0


def test_a_folder_that_is_not_empty_is_refused(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "exists already" in refused()


def test_missing_folders_are_refused(refused, tmp_path):
    assert "nowhere is neither a folder nor a reachable Hub model" in refused(vision=tmp_path / "nowhere")
    assert "nowhere is neither a folder nor a reachable Hub model" in refused(language=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty cannot be loaded" in refused(vision=tmp_path / "empty")


def test_windows_layers_and_widths_that_do_not_fit_are_refused(refused):
    assert "must divide the side of the patch grid, 8" in refused("--pooling-window-size", 3)
    assert "has 3 layers" in refused("--vision-layer", -4)
    assert "from 0 to 3" in refused("--query-layer-idx", 4)


def test_a_tower_without_a_square_grid_is_refused(refused, bases, tmp_path):
    folder, _ = bases
    make_tower(tmp_path / "wide", "dinov2", image_size=(32, 64))
    assert "square images" in refused(vision=tmp_path / "wide")
    assert "square images" in refused(vision=folder / "llama")


def test_a_window_that_pools_nothing_causes_a_warning(run, bases, tmp_path):
    folder, _ = bases
    command = ["--vision", folder / "dinov2", "--language", folder / "phi", "--query-hidden-size", WIDTH]
    code, output, errors = run(tmp_path / "out", *command)
    assert (code, errors.count("\n")) == (0, 1)
    assert errors.startswith("flashsloth: warning: Nothing is pooled: only a window of 1 divides the 5x5 patches")
    assert "25 patches and 25 image tokens per tile" in output
    for number, option in enumerate((["--pooling-window-size", 1], ["--pooling-window-size", 5], ["--image-size", 64])):
        assert run(tmp_path / str(number), *command, *option)[::2] == (0, "")
    with pytest.warns(UserWarning, match="Nothing is pooled"):
        init(folder / "dinov2", folder / "phi", tmp_path / "again", query_hidden_size=WIDTH)


TOWER_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
OTHER_TOWERS = {
    "aimv2_vision_model": {"use_head": True},
    "aimv2_vision_model, native": {"use_head": True, "is_native": True},
    "aimv2_vision_model, without a head": {"use_head": False},
    "beit": {},
    "clip_vision_model": {},
    "deit": {},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "ijepa": {},
    "internvl_vision": {},
    "vit": {},
}


@pytest.mark.parametrize("layer", [None, -1])
@pytest.mark.parametrize("kind", OTHER_TOWERS)
def test_other_towers_work_if_they_return_patch_features(bases, tmp_path, kind, layer):
    model = make_other(tmp_path / "tower", kind.partition(",")[0], **OTHER_TOWERS[kind])
    done = init(tmp_path / "tower", bases[0] / "phi", tmp_path / "out", query_hidden_size=WIDTH, vision_layer=layer)
    built = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    num_layers = 3 if layer == -1 else 2
    assert (done.config.num_patches, done.config.vision_config.num_hidden_layers) == (64, num_layers)
    pixels, outputs = torch.randn(2, 3, 64, 64), []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    layers[num_layers - 1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(pixels)
        expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        found = built.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(found, expected[:, -64:])


def make_other(folder, kind, **changes):
    """Write a tower of another family, and return the model."""
    torch.manual_seed(3)
    sizes = {**TOWER_SIZES, "image_size": 64, "patch_size": 8} | changes
    sizes = {name: size for name, size in sizes.items() if size is not None}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for name, parameter in model.named_parameters():  # initialized to 0 or 1, many would have no effect
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("image_size", "grid"), [(None, 8), (96, 12)])
def test_a_naflex_tower_is_used_at_one_size_and_computes_the_same(bases, tmp_path, image_size, grid):
    model = make_other(tmp_path / "tower", "siglip2_vision_model", image_size=None, num_patches=64)
    outputs = []
    model.encoder.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    done = init(tmp_path / "tower", bases[0] / "phi", tmp_path / "out", query_hidden_size=WIDTH, image_size=image_size)
    built = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    assert (done.config.vision_config.model_type, done.config.patch_grid_size) == ("siglip_vision_model", grid)
    pixels = torch.randn(2, 3, 8 * grid, 8 * grid)
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, grid**2, -1)
    with torch.no_grad():
        model(patches, torch.ones(2, grid**2), torch.tensor([[grid, grid]] * 2))
        found = built.get_image_features(pixels).last_hidden_state
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(found, expected)


def test_a_tower_for_256_pixels_gives_36_tokens_at_288(bases, tmp_path):
    """The geometry of SigLIP 2 base: neither grid, 16x16 or 18x18, is that of the released tower."""
    make_other(tmp_path / "tower", "siglip_vision_model", image_size=256, patch_size=16)
    done = init(
        tmp_path / "tower",
        bases[0] / "lfm2",
        tmp_path / "out",
        image_size=288,
        pooling_window_size=3,
        query_hidden_size=WIDTH,
    )
    assert (done.config.num_patches, done.config.image_seq_length) == (18**2, 36)
    processor = FlashSlothProcessor.from_pretrained(done.output)
    inputs = processor.encode_conversations([question(Image.new("RGB", (336, 336)))])
    assert inputs["pixel_values"].shape[-2:] == (288, 288)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36
    model = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "num_attention_heads": None}
UNFIT_TOWERS = {
    "convnext": ({"hidden_sizes": [8] * 4, "depths": [1] * 4, "hidden_size": None}, "not a vision tower with layers"),
    "pixtral": ({}, "does not give one feature for each of the 64 patches"),
    "swin": (SWIN, "does not give one feature"),
    "swinv2": (SWIN, "does not give one feature"),
    "vit_mae": ({"decoder_num_hidden_layers": 1}, "does not give one feature for each of the 64 patches"),
    "vit_mae, all patches seen": ({"decoder_num_hidden_layers": 1, "mask_ratio": 0.0}, "does not give one feature"),
    "videomae": ({"num_frames": 2}, "does not give one feature"),
}


@pytest.mark.parametrize("kind", UNFIT_TOWERS)
def test_other_towers_are_refused_with_families_that_work(refused, tmp_path, kind):
    changes, reason = UNFIT_TOWERS[kind]
    make_other(tmp_path / "tower", kind.partition(",")[0], **changes)
    line = refused(vision=tmp_path / "tower")
    assert reason in line
    assert line.endswith("; choose another --vision, such as a SigLIP, CLIP, DINOv2, AIMv2 or ViT.\n")


TINY_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
UNFIT_DECODERS = {
    "mamba": ({"state_size": 4}, "whose layers have no attention heads"),
    "opt": ({"ffn_dim": 16, "word_embed_proj_dim": 16}, "whose decoder `AutoModel` cannot build separately"),
    "gpt2": ({"n_embd": 16, "n_head": 2, "n_layer": 2}, "whose decoder has no list `layers`"),
    "bert": ({"is_decoder": True}, "whose decoder has no list `layers`"),
    "falcon": ({}, "whose decoder has no list `layers`"),
    "bloom": ({}, "whose decoder has no list `layers`"),
    "bart": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        "whose decoder `AutoModel` cannot build separately",
    ),
    "t5": ({"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 8}, "but a model of type t5"),
    "blip": ({}, "but a model of type blip"),
}


@pytest.mark.parametrize("kind", UNFIT_DECODERS)
def test_other_decoders_are_refused_with_families_that_work(refused, tmp_path, kind):
    changes, reason = UNFIT_DECODERS[kind]
    make_tokenizer("qwen3").save_pretrained(tmp_path / "decoder")
    config = AutoConfig.for_model(kind, **({"vocab_size": 400} | TINY_TEXT if kind != "blip" else {}), **changes)
    if kind == "mamba":
        del config.num_attention_heads
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "decoder")
    config.save_pretrained(tmp_path / "decoder")
    line = refused(language=tmp_path / "decoder")
    assert reason in line
    assert line.endswith("; choose another --language, such as a Phi, Llama, Qwen3, Gemma 3 or SmolLM3.\n")
    assert not any(internal in line for internal in ("text_config", "AttributeError", "Unrecognized"))
    vision = refused(vision=tmp_path / "decoder")
    assert line != vision
    assert vision.endswith("; choose another --vision, such as a SigLIP, CLIP, DINOv2, AIMv2 or ViT.\n")


@pytest.mark.parametrize("layout", ["ours", "original"])
def test_the_tower_of_a_flashsloth_can_be_used(bases, built, tmp_path, layout):
    source = make_original(tmp_path / "release") if layout == "original" else built["llama"][0].output
    expected = FlashSlothForConditionalGeneration.from_pretrained(source)
    done = init(source, bases[0] / "phi", tmp_path / "out", query_hidden_size=WIDTH)
    found = FlashSlothForConditionalGeneration.from_pretrained(done.output)
    assert found.config.vision_config.to_dict() == expected.config.vision_config.to_dict()
    state = expected.model.vision_tower.state_dict()
    assert found.model.vision_tower.state_dict().keys() == state.keys()
    for name, tensor in found.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    processors = [FlashSlothProcessor.from_pretrained(folder).image_processor for folder in (source, done.output)]
    assert len({str(processor.image_mean) for processor in processors}) == 1
    fewer = init(source, bases[0] / "phi", tmp_path / "fewer", query_hidden_size=WIDTH, vision_layer=-2)
    num_layers = expected.config.vision_config.num_hidden_layers
    assert fewer.config.vision_config.num_hidden_layers == num_layers - 1


def test_a_tower_without_its_weights_is_refused(refused, bases, tmp_path):
    """For example, the tower inside a larger model, whose tensors have other names."""
    folder, _ = bases
    (tmp_path / "tower").mkdir()
    tensors = load_file(folder / "clip" / "model.safetensors")
    tensors = {f"tower.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tower" / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    line = refused(vision=tmp_path / "tower")
    assert "does not have the weights of a vision tower" in line
    assert "choose another --vision" in line


def test_a_flashsloth_cannot_be_used_as_decoder(refused, tmp_path, built):
    for source in (make_original(tmp_path / "release"), built["llama"][0].output):
        assert f"{source} is a whole FlashSloth, not a decoder; choose another" in refused(language=source)


def test_a_decoder_without_layers_is_refused(refused, bases, tmp_path):
    folder, _ = bases
    make_tokenizer("qwen3").save_pretrained(tmp_path / "gpt2")
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 400, "n_positions": 64}
    AutoModelForCausalLM.from_config(GPT2Config(**gpt2)).save_pretrained(tmp_path / "gpt2")
    assert "no list `layers`" in refused(language=tmp_path / "gpt2")
    assert "clip is not a causal decoder" in refused(language=folder / "clip")


def test_a_decoder_that_scales_its_logits_is_refused(refused, tmp_path):
    make_tokenizer("qwen3").save_pretrained(tmp_path / "cohere")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CohereConfig(**sizes, vocab_size=400, logit_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    assert "gives different logits" in refused(language=tmp_path / "cohere")


def test_incomplete_weights_are_refused(refused, bases, tmp_path):
    make_decoder(tmp_path / "phi", "phi")
    file = tmp_path / "phi/model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.1" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    assert "is not complete: 1 tensors are missing" in refused(language=tmp_path / "phi")


MERGED = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
GIVEN = """{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{% if m['content'] is not string %}
{%- for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}
{%- for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% else %}{{ m['content'] }}{% endif -%}
<learnable>{% else %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"""


def test_a_chat_template_can_be_given_if_the_decoders_cannot_be_adapted(refused, run, bases, tmp_path):
    folder, _ = bases
    make_decoder(tmp_path / "odd", "qwen3", spare_rows=8)
    (tmp_path / "odd/chat_template.jinja").write_text(MERGED)
    assert "--chat-template FILE" in refused(language=tmp_path / "odd")
    template = tmp_path / "template.jinja"
    template.write_text(GIVEN)
    arguments = ("--vision", folder / "clip", "--language", tmp_path / "odd", "--chat-template", template)
    code, _, errors = run(tmp_path / "made", *arguments, "--query-hidden-size", WIDTH)
    assert (code, errors) == (0, "")
    assert (tmp_path / "made/chat_template.jinja").read_text() == GIVEN
    processor = FlashSlothProcessor.from_pretrained(tmp_path / "made")
    starts = json.loads((tmp_path / "made/config.json").read_text())["instruction_start_ids"]
    assert [processor.tokenizer.decode(start) for start in starts] == ["<|im_start|>", "<image>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "cannot be rendered"),
        (GIVEN.replace("<learnable>", ""), "<learnable> directly after"),
        (GIVEN.replace("<image>", ""), "image as <image>"),
        (GIVEN.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "generation"),
        (GIVEN.replace("<|im_end|>", "!"), "no special token ends an answer"),
    ],
)
def test_chat_templates_that_flashsloth_cannot_use_are_refused(refused, tmp_path, template, message):
    (tmp_path / "template.jinja").write_text(template)
    assert message in refused("--chat-template", tmp_path / "template.jinja")


def test_a_template_that_renders_later_turns_differently_is_refused():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'\\n' + message", "(' ' if loop.index > 4 else '\\n') + message"
    )
    with pytest.raises(ChatFormatError, match="--chat-template FILE"):
        derive_template(tokenizer)
