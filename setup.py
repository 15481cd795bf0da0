"""Builds the package `flashsloth` from the repository root, which is a Hub model repository at the same time."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHECKPOINT = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
DEMO = ["gradio>=6"]
FILELOCK = "filelock<4"  # lmms-eval 0.7.3 imports a module that 4 no longer has
EVALUATION = ["Levenshtein", FILELOCK, "lmms-eval>=0.7.3"]
# What lmms-eval needs to run without its torchvision, which is not built for a CPU's torch: see .ci/run.
EVALUATION_TESTS = ["evaluate", FILELOCK, "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]
QUANTIZATION = ["bitsandbytes", "torchao>=0.18"]
SERVING = ["accelerate", "fastapi", "openai>=1.98", "requests", "uvicorn"]
TRAINING = [
    "accelerate",
    "bitsandbytes",
    "datasets>=4",
    "matplotlib",
    "peft",
    "pyyaml",
    "tensorboard",
    "trl>=1.16",
]
VIDEO = ["av>=14.2"]


class BuildModules(build_py):
    """Leaves this file out of the package, though it lies beside the modules."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Modules of the package, as setuptools finds them, without `setup`."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    name="flashsloth",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1),
    description="FlashSloth, a small and fast vision-language model, for transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=[
        "huggingface_hub",
        "jinja2",
        "numpy",
        "pillow",
        "safetensors",
        "tokenizers",
        "torch>=2.6",
        "tqdm",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "demo": DEMO,
        "eval": EVALUATION,
        "flash-attn": ["flash-attn"],
        "onnx": ONNX,
        "quantization": QUANTIZATION,
        "serve": SERVING,
        "test": [
            *DEMO,
            *EVALUATION_TESTS,
            *ONNX,
            *QUANTIZATION,
            *SERVING,
            *TRAINING,
            *VIDEO,
            "optimum-quanto",
            "pytest",
            "pytest-xdist",
            "ruff",
            "selenium",
        ],
        "train": TRAINING,
        "video": VIDEO,
    },
    packages=["flashsloth", "flashsloth.cli", "flashsloth.evaluation", "flashsloth.training"],
    package_dir={"flashsloth": "."},
    package_data={"flashsloth": [*CHECKPOINT, "LICENSE"]},
    cmdclass={"build_py": BuildModules},
    entry_points={
        "console_scripts": ["flashsloth = flashsloth.cli:main"],
        "lmms_eval.models": ["flashsloth = flashsloth.evaluation:manifest"],
    },
)
