"""Original releases are converted completely, refused clearly if broken, and not held in memory."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from original_checkpoint import (
    CONFIG,
    PREFIX,
    TOWER,
    make_original,
    original_shapes,
    original_tensors,
    write_json,
    write_weights,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import GenerationConfig

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import convert
from flashsloth.cli.convert import ConversionError, rename

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
IMAGE = Image.radial_gradient("L").resize((40, 30)).convert("RGB")


def compute_logits(model, processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is .?"}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}]).to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs).logits


FRESH_PROCESS = f"""
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)  # as in these tests: the order of a sum depends on it
{inspect.getsource(compute_logits)}
folder, image, output = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "FlashSlothProcessor"
assert model.generation_config.eos_token_id == 50296
save_file({{"logits": compute_logits(model, processor, Image.open(image))}}, output)
"""
MEMORY = """
import sys
import threading
from pathlib import Path
from flashsloth.cli.convert import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

before = peak = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
*sources, output = sys.argv[1:]
for number, source in enumerate(sources):
    convert(source, f"{output}/{number}")
done.set()
watcher.join()
print(peak - before)
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
    """The conversion fails with all parts in its message, and leaves no files."""
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
def test_a_converted_release_equals_the_release_loaded_directly(tmp_path, dtype, num_shards, as_bin, image_hd):
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
    assert done.num_shards == len(list(output.glob("*.safetensors"))) == 1
    assert done.num_parameters == sum(tensor.numel() for tensor in stored.values()) == direct.num_parameters()
    processors = [FlashSlothProcessor.from_pretrained(path) for path in (source, output)]
    assert [p.image_processor.do_image_splitting for p in processors] == [image_hd, image_hd]
    logits = [
        compute_logits(model, processor, IMAGE)
        for model, processor in zip((direct, converted), processors, strict=True)
    ]
    assert torch.equal(*logits)


def test_output_is_a_complete_repository(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(convert, "MAX_SHARD_SIZE", "12MB")
    source = make_original(tmp_path / "in", tensors)
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


@pytest.mark.slow
@pytest.mark.parametrize("image_hd", [False, True])
def test_output_loads_in_a_fresh_process_without_the_package(tmp_path, tensors, image_hd):
    source = make_original(tmp_path / "in", tensors, num_shards=2, image_hd=image_hd)
    convert.convert(source, tmp_path / "out")
    IMAGE.save(tmp_path / "image.png")

    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(FRESH_PROCESS, tmp_path / "out", tmp_path / "image.png", tmp_path / "logits", **home)
    assert result.returncode == 0, result.stderr
    model = FlashSlothForConditionalGeneration.from_pretrained(source)
    expected = compute_logits(model, FlashSlothProcessor.from_pretrained(source), IMAGE)
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], expected, atol=1e-6, rtol=1e-5)


def test_sizes_that_are_not_in_the_config_are_read_from_the_tensors(tmp_path):
    source = make_original(tmp_path / "in", original_tensors(query_hidden_size=8, num_query_tokens=4))
    convert.convert(source, tmp_path / "out")
    config = FlashSlothConfig.from_pretrained(tmp_path / "out")
    assert (config.query_hidden_size, config.num_query_tokens) == (8, 4)
    assert FlashSlothProcessor.from_pretrained(tmp_path / "out").num_query_tokens == 4
    assert FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "out").model.query_tokens.shape[0] == 4


def test_vision_config_describes_a_tower_in_another_folder(tmp_path, tensors):
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
        "wrong dtype: model.pooling.mlp.0.bias (here model.spatial_attention_pooling.fc1.bias), "
        "expected float32, float16 or bfloat16, found int32",
        "missing: model.language_model.layers.3.mlp.fc1.weight, expected shape (40, 32)",
        "missing: model.query_tokens",
    )


def test_a_tensor_in_two_shards_is_named(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors, num_shards=2)
    second = source / "model-00002-of-00002.safetensors"
    write_weights(tmp_path, load_file(second) | {"lm_head.bias": tensors["lm_head.bias"]} | tensors)
    (tmp_path / "model.safetensors").rename(second)
    first, second = (f"lm_head.bias in model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert_refused(source, tmp_path / "out", f"stored twice: lm_head.bias, as {first} and {second}")


def test_two_tensors_with_the_same_converted_name_are_named(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors | {"model.query_tokens": torch.zeros(9, 32)})
    assert_refused(source, tmp_path / "out", "stored twice: model.query_tokens, as", "model.learnable_tokens.token in")


def test_each_tensor_keeps_its_dtype(tmp_path, tensors):
    mixed = {name: tensor.half() if "mlp" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    done = convert.convert(make_original(tmp_path / "in", mixed), tmp_path / "out")
    stored, expected = load_all(tmp_path / "out"), {rename(name): tensor for name, tensor in mixed.items()}
    assert len(stored) == done.num_tensors > 100
    assert all(stored[name].dtype == expected[name].dtype for name in stored)
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert done.dtype == json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_head_is_stored_once(tmp_path, tensors):
    untied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    convert.convert(make_original(tmp_path / "in", untied, tie_word_embeddings=True), tmp_path / "out")
    assert "lm_head.weight" not in load_all(tmp_path / "out")
    model = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_computed_buffers_are_dropped(tmp_path, tensors):
    buffers = {
        f"{PREFIX}embeddings.position_ids": torch.arange(36)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    convert.convert(make_original(tmp_path / "in", tensors | buffers), tmp_path / "out")
    stored = load_all(tmp_path / "out")
    assert stored
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


def test_sources_that_are_not_a_release_are_refused(tmp_path, tensors):
    source = make_original(tmp_path / "in", tensors)
    convert.convert(source, tmp_path / "done")
    assert_refused(tmp_path / "done", tmp_path / "out", "already in this package's layout")
    assert_refused(source, tmp_path / "done", "exists already")
    assert_refused(source / "config.json", tmp_path / "out", "is a file")
    assert_refused(tmp_path / "nowhere", tmp_path / "out", "no such folder")
    assert_refused("nobody/nothing", tmp_path / "out", "neither a folder nor a Hub model")
    write_json(source / "config.json", {"model_type": "phi", "architectures": ["PhiForCausalLM"]})
    assert_refused(source, tmp_path / "out", "neither the architecture FlashSlothForCausalLM nor an `mm_vision_tower`")
    write_json(source / "config.json", {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"})
    assert_refused(source, tmp_path / "out", "`architectures` must be ['FlashSlothForCausalLM']")
    (source / "config.json").unlink()
    assert_refused(source, tmp_path / "out", "config.json")


def change_config(**fields):
    return lambda folder: write_json(folder / "config.json", CONFIG | fields)


def change_tower(**fields):
    return lambda folder: write_json(folder / "siglip-tower/config.json", TOWER | fields)


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def write_index(content, file="model.safetensors.index.json"):
    return lambda folder: write_json(folder / file, content)


def save_bin(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def cut(file, length):
    def change(folder):
        with (folder / file).open("r+b") as stream:
            stream.truncate(length)

    return change


def edit_header(change):
    """Rewrites a safetensors header and keeps the data."""

    def edit(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])

    return edit


BIN_INDEX = "pytorch_model.bin.index.json"
SHARD = "model-00001-of-00001.safetensors"
BROKEN = {  # change: part of the message
    "config is a list": (write("config.json", "[1]"), "must contain a JSON object, but contains a list"),
    "config is text": (write("config.json", '"phi"'), "must contain a JSON object"),
    "config is no JSON": (write("config.json", "{"), "is not a readable JSON file"),
    "config is empty": (write("config.json", ""), "is not a readable JSON file"),
    "config is nested too deeply": (write("config.json", "[" * 100_000), "is not a readable JSON file"),
    "config is no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not a readable JSON file"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "is not a readable JSON file",
    ),
    "hidden_size is text": (change_config(hidden_size="a"), "`hidden_size` must be a whole number from 1, but is 'a'"),
    "hidden_size is a fraction": (change_config(hidden_size=32.5), "`hidden_size` must be a whole number"),
    "hidden_size is true": (change_config(hidden_size=True), "`hidden_size` must be a whole number"),
    "hidden_size is negative": (change_config(hidden_size=-32), "`hidden_size` must be a whole number from 1"),
    "hidden_size is huge": (change_config(hidden_size=10**12), "is invalid"),
    "vocab_size is 0": (change_config(vocab_size=0), "`vocab_size` must be a whole number from 1, but is 0"),
    "more layers than tensors": (change_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000, but"),
    "no heads": (change_config(num_attention_heads=0), "`num_attention_heads` must be a whole number from 1"),
    "heads are a list": (change_config(num_key_value_heads=[2]), "`num_key_value_heads` must be a whole number"),
    "epsilon is not a number": (
        change_config(layer_norm_eps=float("nan")),
        "`layer_norm_eps` must be a number above 0",
    ),
    "epsilon is an object": (change_config(layer_norm_eps={}), "`layer_norm_eps` must be a number above 0"),
    "theta is text": (change_config(rope_theta="10000"), "`rope_theta` must be a number above 0"),
    "theta is infinite": (change_config(rope_theta=float("inf")), "`rope_theta` must be a number above 0"),
    "more than all is rotated": (change_config(partial_rotary_factor=4), "`partial_rotary_factor` must be a number"),
    "scaling is text": (change_config(rope_scaling="linear"), "`rope_scaling` must be an object"),
    "dropout is 2": (change_config(resid_pdrop=2), "`resid_pdrop` must be a number from 0 to 1"),
    "activation is unknown": (change_config(hidden_act="a"), "`hidden_act` must be an activation function"),
    "norms are text": (change_config(qk_layernorm="no"), "`qk_layernorm` must be true or false"),
    "dtype is unknown": (change_config(torch_dtype="float99"), "`torch_dtype` must be a type of torch"),
    "dtype is a number": (change_config(dtype=16), "`dtype` must be a type of torch"),
    "dtype is a function": (change_config(torch_dtype="save"), "`torch_dtype` must be a type of torch"),
    "tower is a number": (change_config(mm_vision_tower=3), "`mm_vision_tower` must be text"),
    "tower is a list": (change_config(mm_vision_tower=["a"]), "`mm_vision_tower` must be text"),
    "projector is a list": (change_config(mm_projector_type=[]), "`mm_projector_type` must be text"),
    "layer is text": (change_config(mm_vision_select_layer="-2"), "`mm_vision_select_layer` must be a whole number"),
    "layer is not there": (change_config(mm_vision_select_layer=9), "`mm_vision_select_layer`=9 is not a layer"),
    "image_hd is text": (change_config(image_hd="false"), "`image_hd` must be true or false"),
    "image token is text": (change_config(image_token_index="<image>"), "`image_token_index` must be a whole number"),
    "image token is another": (change_config(image_token_index=50301), "gives <image> the id 50297, but 50301"),
    "image token is not in the vocabulary": (
        change_config(image_token_index=10**6),
        "outside the decoder's vocabulary",
    ),
    "tower's config is a list": (write("siglip-tower/config.json", "[]"), "must contain a vision tower's config"),
    "tower's config is no JSON": (write("siglip-tower/config.json", "{"), "must contain a vision tower's config"),
    "tower's sizes are text": (change_tower(hidden_size="16"), "`hidden_size` must be a whole number from 1"),
    "tower's image is negative": (change_tower(image_size=-24), "`image_size` must be a whole number from 1"),
    "tower's kind is unknown": (change_tower(model_type="nothing"), "is invalid"),
    "tower has more layers than tensors": (change_tower(num_hidden_layers=10**9), "but there are"),
    "tower's grid has no window": (change_tower(image_size=28), "`pooling_window_size`=3 must divide"),
    "index is a list": (write_index([]), "must contain a JSON object, but contains a list"),
    "index is no JSON": (write("model.safetensors.index.json", "{"), "is not a readable JSON file"),
    "index without a map": (write_index({"metadata": {}}), "must contain a `weight_map` of tensor names to file names"),
    "map is a list": (write_index({"weight_map": ["a"]}), "must contain a `weight_map`"),
    "map is empty": (write_index({"weight_map": {}}), "must contain a `weight_map`"),
    "map is null": (write_index({"weight_map": None}), "must contain a `weight_map`"),
    "file is a number": (write_index({"weight_map": {"a": 1}}), "in its own folder, but names 1"),
    "files are lists": (write_index({"weight_map": {"a": [SHARD]}}), "in its own folder, but names ['model-"),
    "file is null": (write_index({"weight_map": {"a": None}}), "in its own folder, but names None"),
    "file has no name": (write_index({"weight_map": {"a": ""}}), "in its own folder, but names ''"),
    "file lies outside": (write_index({"weight_map": {"a": f"../{SHARD}"}}), "in its own folder, but names '../model"),
    "file lies inside": (write_index({"weight_map": {"a": f"siglip-tower/{SHARD}"}}), "in its own folder, but names"),
    "file is absolute": (write_index({"weight_map": {"a": f"/{SHARD}"}}), "in its own folder, but names '/model"),
    "file lies outside on Windows": (
        write_index({"weight_map": {"a": f"..\\{SHARD}"}}),
        "in its own folder, but names",
    ),
    "file is of another kind": (write_index({"weight_map": {"a": "config.json"}}), "must name `*.safetensors` files"),
    "file of the other index lies outside": (
        lambda f: ((f / "model.safetensors").unlink(), write_index({"weight_map": {"a": "../a.bin"}}, BIN_INDEX)(f)),
        "must name `*.bin` files in its own folder, but names '../a.bin'",
    ),
    "file name holds a zero byte": (write_index({"weight_map": {"a": "a\0.safetensors"}}), "no such file"),
    "file is too long a name": (write_index({"weight_map": {"a": "a" * 300 + ".safetensors"}}), ".safetensors"),
    "weights are empty": (cut("model.safetensors", 0), "is damaged or not a safetensors file"),
    "weights end in the header": (cut("model.safetensors", 100), "is damaged or not a safetensors file"),
    "weights end in the data": (cut("model.safetensors", 10**6), "is damaged or not a safetensors file"),
    "weights are text": (write("model.safetensors", "no weights"), "is damaged or not a safetensors file"),
    "header holds overlapping tensors": (
        edit_header(lambda h: h["lm_head.bias"].update(data_offsets=h["lm_head.weight"]["data_offsets"])),
        "is damaged or not a safetensors file",
    ),
    "header holds an unknown dtype": (
        edit_header(lambda h: h["lm_head.bias"].update(dtype="F7")),
        "is damaged or not a safetensors file",
    ),
    "header holds a negative shape": (
        edit_header(lambda h: h["lm_head.bias"].update(shape=[-1])),
        "is damaged or not a safetensors file",
    ),
    "bin is a list": (save_bin([torch.zeros(1)]), "must contain a dict of tensors by name"),
    "bin is a tensor": (save_bin(torch.zeros(1)), "must contain a dict of tensors by name"),
    "bin has numbers as names": (save_bin({1: torch.zeros(1)}), "must contain a dict of tensors by name"),
    "bin has pairs as names": (save_bin({("a", "b"): torch.zeros(1)}), "must contain a dict of tensors by name"),
    "bin holds text": (save_bin({"a": "b"}), "must contain a dict of tensors by name"),
    "bin holds a dict of dicts": (save_bin({"state_dict": {"a": torch.zeros(1)}}), "must contain a dict of tensors"),
    "bin is empty": (save_bin({}), "tensors are not as expected"),
    "bin holds sparse tensors": (save_bin({"lm_head.bias": torch.ones(50304).to_sparse()}), "wrong layout"),
    "bin holds complex numbers": (save_bin({"lm_head.bias": torch.zeros(50304, dtype=torch.complex64)}), "wrong dtype"),
    "bin is no pickle": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"no pickle")),
        "damaged",
    ),
    "bin is 0 bytes": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").touch()),
        "damaged",
    ),
    "vocabulary is a list": (write("vocab.json", "[]"), "vocab.json must contain a JSON object, but contains a list"),
    "vocabulary is no JSON": (write("vocab.json", "{"), "vocab.json is not a readable JSON file"),
    "vocabulary has texts as ids": (write("vocab.json", '{"a": "b"}'), "tokenizer is invalid"),
    "merges are bytes": (lambda f: (f / "merges.txt").write_bytes(b"\xff" * 99), "tokenizer is invalid"),
    "added tokens are a list": (write("added_tokens.json", "[]"), "added_tokens.json must contain a JSON object"),
    "special tokens are a text": (
        write("special_tokens_map.json", '"a"'),
        "special_tokens_map.json must contain a JSON",
    ),
    "tokenizer's config is a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json must contain a JSON"),
    "tokenizer's config is no JSON": (
        write("tokenizer_config.json", "{"),
        "tokenizer_config.json is not a readable JSON file",
    ),
    "tokenizer's class is a number": (write("tokenizer_config.json", '{"tokenizer_class": 3}'), "tokenizer"),
    "tokenizer is broken": (write("tokenizer.json", "{}"), "tokenizer is invalid"),
    "generation config is a list": (write("generation_config.json", "[]"), "must contain a JSON object"),
    "generation config is no JSON": (write("generation_config.json", "{"), "is not a readable JSON file"),
    "beams are text": (write("generation_config.json", '{"num_beams": "a"}'), "generation_config.json is invalid"),
    "temperature is text": (
        write("generation_config.json", '{"do_sample": true, "temperature": "hot"}'),
        "generation_config.json is invalid",
    ),
}


@pytest.mark.parametrize(("change", "part"), BROKEN.values(), ids=BROKEN)
def test_broken_sources_are_refused_with_a_clear_line(tmp_path, tensors, change, part):
    source = make_original(tmp_path / "in", tensors)
    change(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError) as error:
        convert.convert(source, tmp_path / "out")
    message = str(error.value)
    assert part in message
    assert message.startswith(f"{source} cannot be converted: ")
    assert "\n" not in message or "not as expected; nothing was written" in message
    assert sorted(tmp_path.iterdir()) == before


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


def test_an_interrupted_conversion_leaves_no_files(tmp_path, tensors, monkeypatch):
    def interrupted(self, folder, **kwargs):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(FlashSlothForConditionalGeneration, "save_pretrained", interrupted)
    source = make_original(tmp_path / "in", tensors)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_an_empty_output_folder_is_used(tmp_path, tensors):
    (tmp_path / "out").mkdir()
    convert.convert(make_original(tmp_path / "in", tensors), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_cache(tmp_path, tensors):
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
    assert card.data.base_model is None  # a tiny model is not trained from Phi-2


def test_the_card_of_the_released_sizes_names_its_base_models():
    card = convert.model_card.build_model_card(
        FlashSlothConfig(), name="sloth", dtype="float16", num_parameters=3_200_000_000, do_image_splitting=True
    )
    assert card.data.base_model == ["microsoft/phi-2", "google/siglip-so400m-patch14-384"]
    assert "405 tokens" in card.text.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_weights_are_mapped_and_not_held_in_memory(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 12288}
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in original_shapes(**sizes).items()}
    for name, as_bin in (("safetensors", False), ("bin", True)):
        make_original(tmp_path / name, tensors, num_shards=4, as_bin=as_bin, **sizes)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    result = run_python(MEMORY, tmp_path / "safetensors", tmp_path / "bin", tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 0.2 * num_bytes
