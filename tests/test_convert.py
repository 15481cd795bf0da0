"""Converting original releases: what comes out, what is refused, and how much memory it takes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from original_checkpoint import PREFIX, make_original, original_shapes, original_tensors, write_json, write_weights
from PIL import Image
from safetensors.torch import load_file
from transformers import GenerationConfig

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import convert
from flashsloth.cli.convert import ConversionError, original_name_of, rename

ROOT = Path(__file__).parents[1]
OUTPUT_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "handler.py",
    *(file.name for file in ROOT.glob("*_flashsloth.py")),
}
PICTURE = Image.radial_gradient("L").resize((40, 30)).convert("RGB")


def compute_logits(model, processor, picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is .?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs).logits


FRESH_PROCESS = f"""
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)  # as here: the order of a sum depends on it
{inspect.getsource(compute_logits)}
folder, picture, output = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "FlashSlothProcessor"
assert model.generation_config.eos_token_id == 50296
save_file({{"logits": compute_logits(model, processor, Image.open(picture))}}, output)
"""
MEMORY = """
import sys
from pathlib import Path
from flashsloth.cli.convert import convert

def read(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

before = read("VmRSS")
convert(*sys.argv[1:])
print(read("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def tensors():
    return original_tensors()


def run_python(code, *arguments, **env):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def load_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_refused(source, output, *parts, **kwargs):
    """The conversion fails, its message has all the parts, and nothing is left behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        convert.convert(source, output, **kwargs)
    for part in parts:
        assert part in str(error.value)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("dtype", "num_shards", "as_bin", "image_hd"),
    [
        (torch.float32, 1, False, False),
        (torch.float16, 3, False, True),
        (torch.bfloat16, 2, True, False),
        (torch.float16, 1, True, True),
        (torch.bfloat16, 1, False, False),
        (torch.float32, 3, True, True),
    ],
)
def test_every_kind_of_release_becomes_what_loading_it_directly_gives(tmp_path, dtype, num_shards, as_bin, image_hd):
    source = make_original(
        tmp_path / "in", original_tensors(dtype), num_shards=num_shards, as_bin=as_bin, image_hd=image_hd
    )
    output = tmp_path / "out"
    done = convert.convert(source, output)

    direct, converted = (FlashSlothForConditionalGeneration.from_pretrained(path) for path in (source, output))
    stored, expected = load_all(output), direct.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) and stored[name].dtype == dtype for name in stored)
    assert converted.dtype == direct.dtype == dtype
    assert done.num_shards == len(list(output.glob("*.safetensors"))) == num_shards
    assert done.num_parameters == sum(tensor.numel() for tensor in stored.values()) == direct.num_parameters()
    processors = [FlashSlothProcessor.from_pretrained(path) for path in (source, output)]
    assert [p.image_processor.do_image_splitting for p in processors] == [image_hd, image_hd]
    logits = [
        compute_logits(model, processor, PICTURE)
        for model, processor in zip((direct, converted), processors, strict=True)
    ]
    assert torch.equal(*logits)


def test_output_is_a_complete_repository(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors, num_shards=2)
    write_json(source / "generation_config.json", {"eos_token_id": 50256, "repetition_penalty": 1.1, "max_length": 20})
    convert.convert(source, tmp_path / "out")

    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == OUTPUT_FILES | weights
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["FlashSlothForConditionalGeneration"]
    assert config["dtype"] == "float32"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (50256, 50296, 50256)
    assert sorted(generation["suppress_tokens"]) == [50295, 50297]
    assert generation["repetition_penalty"] == 1.1
    assert "max_length" not in generation
    direct = FlashSlothForConditionalGeneration.from_pretrained(source).generation_config
    assert direct.to_diff_dict() == GenerationConfig.from_pretrained(tmp_path / "out").to_diff_dict()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_all(tmp_path / "out").values())
    assert set(index["weight_map"]) == load_all(tmp_path / "out").keys()


@pytest.mark.parametrize("image_hd", [False, True])
def test_output_loads_in_a_fresh_process_without_the_package(tmp_path, tensors, image_hd):
    source = make_original(tmp_path / "in", tensors, num_shards=2, image_hd=image_hd)
    convert.convert(source, tmp_path / "out")
    PICTURE.save(tmp_path / "picture.png")

    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(FRESH_PROCESS, tmp_path / "out", tmp_path / "picture.png", tmp_path / "logits", **home)
    assert result.returncode == 0, result.stderr
    model = FlashSlothForConditionalGeneration.from_pretrained(source)
    expected = compute_logits(model, FlashSlothProcessor.from_pretrained(source), PICTURE)
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], expected, atol=1e-6, rtol=1e-5)


def test_names_are_translated_there_and_back():
    for name in original_shapes():
        assert original_name_of(rename(name)) == name


def test_sizes_that_no_config_holds_are_read_off_the_tensors(tmp_path):
    source = make_original(tmp_path / "in", original_tensors(query_hidden_size=8, num_query_tokens=4))
    convert.convert(source, tmp_path / "out")
    config = FlashSlothConfig.from_pretrained(tmp_path / "out")
    assert (config.query_hidden_size, config.num_query_tokens) == (8, 4)
    assert FlashSlothProcessor.from_pretrained(tmp_path / "out").num_query_tokens == 4
    assert FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "out").model.query_tokens.shape[0] == 4


def test_vision_config_describes_a_tower_that_lies_elsewhere(tmp_path, tensors):
    tower = tmp_path / "tower"
    source = make_original(tmp_path / "in", tensors, tower_folder=tower, mm_vision_tower="google/siglip")
    assert_refused(source, tmp_path / "out", f"{PREFIX}embeddings.patch_embedding.weight", "--vision-config")
    convert.convert(source, tmp_path / "out", vision_config=tower)
    processor = FlashSlothProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.size == {"height": 24, "width": 24}
    assert processor.image_seq_length == 4


def test_all_wrong_tensors_are_named_at_once(tmp_path, tensors):
    tensors = {**tensors, "model.extra.weight": torch.zeros(2), "lm_head.bias": torch.zeros(3)}
    tensors["model.pooling.mlp.0.bias"] = tensors["model.pooling.mlp.0.bias"].int()
    del tensors["model.layers.3.mlp.fc1.weight"], tensors["model.learnable_tokens.token"]
    assert_refused(
        make_original(tmp_path / "in", tensors, num_shards=2),
        tmp_path / "out",
        "5 tensors are not as expected",
        "unexpected: model.extra.weight",
        "wrong shape: lm_head.bias, expected (50304,), found (3,)",
        "wrong dtype: model.pooling.mlp.0.bias",
        "missing: model.layers.3.mlp.fc1.weight (here model.language_model.layers.3.mlp.fc1.weight), "
        "expected shape (40, 32)",
        "missing: model.learnable_tokens.token",
    )


def test_a_tensor_in_two_shards_is_named(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors, num_shards=2)
    second = source / "model-00002-of-00002.safetensors"
    write_weights(tmp_path, load_file(second) | {"lm_head.bias": tensors["lm_head.bias"]} | tensors)
    (tmp_path / "model.safetensors").rename(second)
    assert_refused(source, tmp_path / "out", "there twice: lm_head.bias, in model-00001-of-00002.safetensors and")


def test_buffers_that_are_computed_are_dropped(tmp_path, tensors):
    buffers = {
        f"{PREFIX}embeddings.position_ids": torch.arange(36)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    convert.convert(make_original(tmp_path / "in", tensors | buffers), tmp_path / "out")
    stored = load_all(tmp_path / "out")
    assert not any("position_ids" in name or "inv_freq" in name or "post_layernorm" in name for name in stored)


@pytest.mark.parametrize("as_bin", [False, True])
def test_a_truncated_shard_is_refused(tmp_path, tensors, as_bin):
    source = make_original(tmp_path / "in", tensors, num_shards=2, as_bin=as_bin)
    shard = max(source.glob("*-00002-of-*"))
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1000)
    assert_refused(source, tmp_path / "out", shard.name, "damaged")


def test_code_in_a_bin_file_is_refused_and_not_run(tmp_path, tensors):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    source = make_original(tmp_path / "in", tensors, as_bin=True)
    torch.save({**tensors, "payload": Payload()}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path / "out", "pytorch_model.bin", "code")


def test_bin_files_of_old_torch_and_views_are_read(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors, as_bin=True)
    name = "model.pooling.mlp.0.weight"
    tensors = {**tensors, name: tensors[name].t().contiguous().t()}
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert.convert(source, tmp_path / "out")
    assert torch.equal(load_all(tmp_path / "out")[rename(name)], tensors[name])


def test_what_is_no_release_is_refused(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors)
    convert.convert(source, tmp_path / "done")
    assert_refused(tmp_path / "done", tmp_path / "out", "this package's layout already")
    assert_refused(source, tmp_path / "done", "exists already")
    assert_refused(source / "config.json", tmp_path / "out", "is a file")
    assert_refused(tmp_path / "nowhere", tmp_path / "out", "no such folder")
    assert_refused("nobody/nothing", tmp_path / "out", "neither a folder nor a Hub model")
    write_json(source / "config.json", {"model_type": "phi"})
    assert_refused(source, tmp_path / "out", "mm_vision_tower")
    (source / "config.json").unlink()
    assert_refused(source, tmp_path / "out", "config.json")


def test_missing_files_of_a_release_are_named(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors, num_shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert_refused(source, tmp_path / "out", "model-00002-of-00002.safetensors")
    (source / "model.safetensors.index.json").unlink()
    (source / "model-00001-of-00002.safetensors").unlink()
    assert_refused(source, tmp_path / "out", "no weights")
    write_weights(source, tensors)
    (source / "vocab.json").unlink()
    assert_refused(source, tmp_path / "out", "tokenizer")


def test_an_interruption_leaves_nothing_behind(tmp_path, tensors, monkeypatch):
    def interrupted(*args):
        yield 1
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_safetensors", interrupted)
    source = make_original(tmp_path / "in", tensors)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_an_empty_output_folder_is_used(tmp_path, tensors):
    (tmp_path / "out").mkdir()
    convert.convert(make_original(tmp_path / "in", tensors), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_hub_id_is_read_from_what_was_downloaded(tmp_path, tensors):
    repository = tmp_path / "cache/models--someone--sloth"
    source = make_original(repository / "snapshots" / ("0" * 40), tensors)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    code = "import sys; from flashsloth.cli.convert import convert; convert('someone/sloth', sys.argv[1])"
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = run_python(code, tmp_path / "out", **environment)
    assert result.returncode == 0, result.stderr
    expected = FlashSlothForConditionalGeneration.from_pretrained(source).state_dict()
    assert load_all(tmp_path / "out").keys() == expected.keys()


def test_the_card_has_valid_metadata(tmp_path, tensors):
    convert.convert(make_original(tmp_path / "in", tensors), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"custom_code", "flashsloth"} <= set(card.data.tags)
    assert card.data.base_model is None  # a tiny model did not grow from Phi-2


def test_the_card_of_the_released_sizes_names_its_base_models():
    card = convert.model_card.build_model_card(
        FlashSlothConfig(), name="sloth", dtype="float16", num_parameters=3_200_000_000, high_definition=True
    )
    assert card.data.base_model == ["microsoft/phi-2", "google/siglip-so400m-patch14-384"]
    assert "405 tokens" in card.text.replace("\n", " ")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("as_bin", [False, True])
def test_memory_stays_below_one_and_a_half_shards(tmp_path, as_bin):
    sizes = {"hidden_size": 512, "intermediate_size": 12288}
    shapes = original_shapes(**sizes)
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    source = make_original(tmp_path / "in", tensors, num_shards=4, as_bin=as_bin, **sizes)
    del tensors
    largest = max(file.stat().st_size for file in source.glob("*-of-*"))
    result = run_python(MEMORY, source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1.5 * largest
