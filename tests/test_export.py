"""An exported repository is complete, loads without the package, and contains no unrelated files."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from original_checkpoint import make_original
from peft import LoraConfig, get_peft_model
from PIL import Image
from processes import run_alone
from safetensors.torch import load_file, save_file
from transformers import TorchAoConfig

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import build_parser, main
from flashsloth.cli.convert import convert
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes.png"
STRAY = ("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", ".env", "notes.txt", "events.out")
EXPECTED = {
    "README.md",
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "handler.py",
    *(file.name for file in ROOT.glob("*_flashsloth.py")),
}
WITHOUT_PACKAGE = """
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
folder, image = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": image}, {"type": "text", "text": "Describe the picture."}]
inputs = processor.encode_conversations([{"role": "user", "content": content}])
answer = model.generate(**inputs, max_new_tokens=50)[:, inputs["input_ids"].shape[1] :]
print(processor.post_process_image_text_to_text(answer)[0])
"""


@pytest.fixture
def run(capsys):
    def run_main(*arguments):
        code = main(["export", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture(scope="module")
def training_folder(tmp_path_factory):
    """The shipped checkpoint as a Trainer saves it, with files that do not belong on the Hub."""
    folder = tmp_path_factory.mktemp("training") / "trained"
    FlashSlothForConditionalGeneration.from_pretrained(ROOT).save_pretrained(folder)
    FlashSlothProcessor.from_pretrained(ROOT).save_pretrained(folder)
    for name in STRAY:
        (folder / name).write_text("HF_TOKEN=secret")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_text("old")
    return folder


@pytest.fixture
def trained(training_folder, tmp_path):
    return shutil.copytree(training_folder, tmp_path / "trained")


@pytest.fixture
def refused(run, tmp_path):
    """Runs an export that must fail with one line and write nothing; returns the line."""

    def run_refused(checkpoint, *options):
        code, output, errors = run(checkpoint, tmp_path / "out", *options)
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert not (tmp_path / "out").exists()
        return errors

    return run_refused


def answer(image, question, checkpoint=ROOT, max_new_tokens=128):
    model = FlashSlothForConditionalGeneration.from_pretrained(checkpoint)
    processor = FlashSlothProcessor.from_pretrained(checkpoint)
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}]).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(output)[0]


def card_of(folder):
    return ModelCard.load(folder / "README.md").data


@pytest.mark.slow
def test_a_repository_is_complete_and_loads_without_the_package(run, trained, tmp_path):
    code, output, errors = run(trained, tmp_path / "out", "--license", "apache-2.0")
    assert (code, errors) == (0, "")
    assert {file.name for file in (tmp_path / "out").iterdir()} == EXPECTED
    assert "12,423,425 parameters, bfloat16, 24.8 MB" in output
    assert all(name in output for name in STRAY)
    (tmp_path / "script.py").write_text(WITHOUT_PACKAGE)
    printed = run_alone(tmp_path / "script.py", tmp_path / "out", SHAPES, folder=tmp_path)
    assert printed.strip().startswith("a yellow star top left, an orange square top right")


def test_weights_are_those_of_the_checkpoint(run, trained, tmp_path):
    assert run(trained, tmp_path / "out")[0] == run(trained, tmp_path / "half", "--dtype", "float16")[0] == 0
    before, after, half = (
        load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "out", tmp_path / "half")
    )
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_the_card_has_the_given_metadata_and_the_measured_results(run, trained, tmp_path):
    lmms = {
        "results": {
            "mme": {
                "alias": "mme",
                "mme_score,none": 1502.5,
                "mme_score_stderr_clt,none": 3.0,
                "gpt,none": float("nan"),
            }
        }
    }
    (tmp_path / "lmms.json").write_text(json.dumps(lmms))
    options = ["--name", "someone/sloth", "--license", "mit", "--base-model", "microsoft/phi-2"]
    options += ["--evaluation", tmp_path / "lmms.json", "--evaluation", ROOT / "examples/tiny/evaluation.json"]
    options += ["--example", SHAPES, "What is top left?", "--example", "https://example.org/a.png", "Why?"]
    code, output, _ = run(trained, tmp_path / "out", *options)
    assert code == 0
    data = card_of(tmp_path / "out")
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-text-to-text", "transformers", "mit")
    assert {"custom_code", "conversational"} <= set(data.tags)
    assert data.base_model == ["microsoft/phi-2"]
    assert data.widget == [
        {
            "text": "What is top left?",
            "src": "examples/shapes.png",
            "output": {"text": answer(SHAPES, "What is top left?")},
        },
        {"text": "Why?", "src": "https://example.org/a.png"},
    ]
    assert "no answer to 'Why?' about https://example.org/a.png" in output
    assert (tmp_path / "out" / "examples" / "shapes.png").read_bytes() == SHAPES.read_bytes()
    values = {
        (result.dataset_name, result.metric_name or result.metric_type): result.metric_value
        for result in data.eval_results
    }
    counts = json.loads((ROOT / "examples/tiny/evaluation.json").read_text())["scenes"]["all"]
    assert values["mme", "mme_score"] == 1502.5
    assert values["drawn-scenes", "exact match: scenes"] == counts["right"] / counts["asked"]
    metrics = {metric.partition(":")[0] for _, metric in values}
    assert metrics == {"mme_score", "exact match"}  # no standard error, nothing that is NaN
    assert not (tmp_path / "out" / "LICENSE").exists()  # ours is not the MIT licence


def test_the_card_has_a_command_for_each_engine_and_says_what_does_not_work(run, trained, tmp_path):
    assert run(trained, tmp_path / "out", "--name", "someone/sloth", "--license", "mit")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    headings = re.findall("^##+ (.*)$", text, flags=re.MULTILINE)
    assert {"Use", "With onnxruntime", "On Inference Endpoints", "Limits", "Licence"} <= set(headings)
    assert "Not supported: llama.cpp, Ollama, MLX, SGLang" in headings
    assert "Licence of the weights: mit." in text
    commands = [
        shlex.split(line) for block in re.findall("```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    assert {(program, command) for program, command, *_ in commands} == {
        *(("flashsloth", name) for name in ("ask", "chat", "caption", "demo", "onnx")),
        ("transformers", "serve"),
    }
    for program, *arguments in commands:
        assert "someone/sloth" in arguments
        if program == "flashsloth":
            build_parser().parse_args(arguments)
    for way in ('.to("cuda")', '.to("mps")', 'device_map="auto"', "`vllm serve someone/sloth`"):
        assert way in text


@pytest.mark.slow
def test_the_code_of_the_card_runs_without_the_package(run, trained, tmp_path):
    assert run(trained, tmp_path / "out", "--name", "someone/sloth")[0] == 0
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    (question,) = re.findall(r'"text": "(.*?)"', code)
    code = code.replace('"someone/sloth"', repr(str(tmp_path / "out"))).replace('"image.jpg"', repr(str(SHAPES)))
    (tmp_path / "script.py").write_text(f'import sys\n\nsys.modules["flashsloth"] = None\n{code}print(answer)\n')
    printed = run_alone(tmp_path / "script.py", folder=tmp_path)
    assert printed.strip() == answer(SHAPES, question, max_new_tokens=256)


def test_the_card_states_sizes_and_memory(run, trained, tmp_path):
    assert run(trained, tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    model, processor = (one.from_pretrained(ROOT) for one in (FlashSlothForConditionalGeneration, FlashSlothProcessor))
    inputs = processor(images=SHAPES, text="USER: <image>\nWhy?<learnable> ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        cache = model(**inputs.to(dtype=model.dtype), use_cache=True).past_key_values
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / cache.get_seq_length()
    num_bytes = (ROOT / "model.safetensors").stat().st_size
    found = re.search(r"\| Memory \| ([\d.]+) MB of weights, .* ([\d.]+) kB per token, ([\d.]+) kB per image \|", text)
    assert float(found[1]) == pytest.approx(num_bytes / 1e6, rel=0.01)
    assert float(found[2]) == pytest.approx(per_token / 1e3, rel=0.01)
    assert float(found[3]) == pytest.approx(per_token * model.config.image_seq_length / 1e3, rel=0.01)
    assert f"room for {model.config.text_config.max_position_embeddings:,} tokens" in text


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    torchao, skipped = pytest.importorskip("torchao.quantization"), list(UNQUANTIZED_MODULES)
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2), modules_to_not_convert=skipped)
    folder = tmp_path_factory.mktemp("quantized") / "sloth-int8"
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(folder)
    FlashSlothProcessor.from_pretrained(ROOT).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_quantised_checkpoint_keeps_its_weights_and_is_a_variant_of_its_base_model(run, quantized, tmp_path):
    code, output, _ = run(quantized, tmp_path / "out", "--base-model", "USER/tiny-sloth")
    weights = (quantized / "model.safetensors").read_bytes()
    assert code == 0
    assert f"{len(weights) / 1e6:,.1f} MB" in output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    data = card_of(tmp_path / "out")
    assert (data.base_model, data.get("base_model_relation")) == (["USER/tiny-sloth"], "quantized")
    assert "| Data type | bfloat16, torchao |" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "script.py").write_text(WITHOUT_PACKAGE)
    printed = run_alone(tmp_path / "script.py", tmp_path / "out", SHAPES, folder=tmp_path)
    assert printed.strip() == answer(SHAPES, "Describe the picture.", quantized)


@pytest.mark.slow
def test_a_quantised_checkpoint_is_not_converted_or_merged(run, refused, quantized, tmp_path):
    assert "leave out --dtype" in refused(quantized, "--dtype", "float32")
    assert "name the original model with --base-model" in run(quantized, tmp_path / "named")[1]
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    get_peft_model(model, LoraConfig(target_modules=LORA_TARGET_MODULES, r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(quantized)}))
    assert "is quantised (torchao), so it cannot be merged exactly" in refused(tmp_path / "adapter")


def test_the_relation_to_a_base_model_is_kept(run, trained, tmp_path):
    (trained / "README.md").write_text("---\nbase_model: someone/base\nbase_model_relation: finetune\n---\n")
    assert run(trained, tmp_path / "out")[0] == 0
    assert card_of(tmp_path / "out").get("base_model_relation") == "finetune"


def test_metadata_of_the_checkpoints_card_is_kept(run, trained, tmp_path):
    (trained / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\n---\n# Mine\n")
    (trained / "LICENSE").write_text("My licence")
    assert run(trained, tmp_path / "out")[0] == 0
    assert (card_of(tmp_path / "out").license, card_of(tmp_path / "out").base_model) == ("mit", ["someone/base"])
    assert (tmp_path / "out" / "LICENSE").read_text() == "My licence"


def test_a_misspelled_licence_is_refused(refused, trained):
    assert "such as apache-2.0, mit or other, not 'Apache 2.0'" in refused(trained, "--license", "Apache 2.0")


def test_a_missing_licence_is_reported(run, trained, tmp_path):
    assert "--license" in run(trained, tmp_path / "out")[1]
    assert card_of(tmp_path / "out").license is None


def test_an_adapter_is_merged(run, trained, tmp_path):
    torch.manual_seed(0)
    model = FlashSlothForConditionalGeneration.from_pretrained(trained)
    adapted = get_peft_model(model, LoraConfig(target_modules=LORA_TARGET_MODULES, init_lora_weights=False, r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "out")[0] == 0
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), adapted.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert str(tmp_path) in (tmp_path / "adapter" / "README.md").read_text()  # peft writes the base model's path
    texts = [file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"]
    assert not any(str(tmp_path) in text for text in texts)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[name], load_file(trained / "model.safetensors")[name])


def test_an_original_release_is_exported_and_an_adapter_for_one_is_merged(run, tmp_path):
    release = make_original(tmp_path / "release")
    assert run(release, tmp_path / "out")[0] == 0
    convert(release, tmp_path / "converted")
    expected = load_file(tmp_path / "converted" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("flashsloth", "phi")

    model = FlashSlothForConditionalGeneration.from_pretrained(release)
    adapted = get_peft_model(model, LoraConfig(target_modules=LORA_TARGET_MODULES, init_lora_weights=False, r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "merged")[0] == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert FlashSlothProcessor.from_pretrained(tmp_path / "merged").image_seq_length == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "must contain a JSON object"),
        ("{", "is not a readable JSON file"),
        ("{}", "does not name a base model"),
        ('{"base_model_name_or_path": 3}', "does not name a base model"),
        ('{"base_model_name_or_path": ""}', "does not name a base model"),
        (f'{{"base_model_name_or_path": "{ROOT}", "peft_type": "NOTHING"}}', "cannot be exported"),
        (f'{{"base_model_name_or_path": "{ROOT}", "peft_type": "LORA", "r": "a"}}', "cannot be exported"),
    ],
)
def test_a_broken_adapter_is_refused(refused, tmp_path, content, reason):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    assert reason in refused(tmp_path / "adapter")


def test_an_adapter_without_its_base_model_is_refused(refused, tmp_path):
    (tmp_path / "adapter").mkdir()
    content = {"base_model_name_or_path": str(tmp_path / "nothing"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    assert f"whose base model {tmp_path / 'nothing'} cannot be loaded" in refused(tmp_path / "adapter")


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_json(file, **fields):
    def apply(folder):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | fields))

    return apply


BROKEN = {
    "there is no such folder": shutil.rmtree,
    "it has no config.json": remove("config.json"),
    "its model_type is 'phi'": change_json("config.json", model_type="phi"),
    "contains no weights": remove("model.safetensors"),
    "tensors are missing from its weights: 1, such as model.query_tokens": change_tensors(
        lambda tensors: tensors.pop("model.query_tokens")
    ),
    "its weights contain unexpected tensors: 1, such as model.extra": change_tensors(
        lambda tensors: tensors.update({"model.extra": torch.zeros(1)})
    ),
    "cannot be exported: ": lambda folder: (folder / "model.safetensors").write_bytes(b"broken"),
    "name one with --processor": remove("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    "its number of query tokens is 5, but the model's is 8": change_json("processor_config.json", num_query_tokens=5),
    "`asked` and `right`": lambda folder: (folder / "evaluation.json").write_text('{"colour": 1}'),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(refused, trained, reason):
    BROKEN[reason](trained)
    assert reason in refused(trained)


def test_a_folder_in_use_and_a_missing_example_are_refused(run, refused, trained):
    assert "exists already" in run(trained, trained)[2]
    assert "no example image nothing.png" in refused(trained, "--example", "nothing.png", "Why?")


def test_the_processor_may_be_in_another_folder(run, trained, tmp_path):
    remove("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")(trained)
    assert run(trained, tmp_path / "out", "--processor", ROOT)[0] == 0
    assert EXPECTED - {"LICENSE"} == {file.name for file in (tmp_path / "out").iterdir()}


def test_two_examples_of_one_name_are_refused(refused, trained, tmp_path):
    examples = []
    for number in range(2):
        image = tmp_path / str(number) / "image.png"
        image.parent.mkdir()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(image)
        examples += ["--example", str(image), "Why?"]
    assert "two example images are called image.png; rename one of them." in refused(trained, *examples)
