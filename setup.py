"""Builds the package `flashsloth` from the repository root, which is also a Hub model repository."""

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
EXAMPLES = ["examples/scene.png", "examples/shapes.png"]  # of the demo
# Lower bounds are the oldest releases that the tests have run with.
DEMO = ["gradio>=6.31"]
FILELOCK = "filelock<4"  # lmms-eval 0.7.3 imports a module that 4 no longer has
EVALUATION = ["Levenshtein", FILELOCK, "lmms-eval>=0.7.3"]
# Dependencies of lmms-eval without torchvision, which is not built for torch on the CPU; see .ci/run.
EVALUATION_TESTS = ["evaluate", FILELOCK, "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity"]
ACCELERATE = "accelerate>=1.15"
BITSANDBYTES = "bitsandbytes>=0.50"
LINT = ["mypy==2.4.1", "ruff==0.17.6"]  # as in .pre-commit-config.yaml
ONNX = ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"]
QUANTIZATION = [BITSANDBYTES, "torchao>=0.18"]
SERVING = [ACCELERATE, "fastapi>=0.165", "openai>=3.57", "requests", "uvicorn>=0.54"]
TRAINING = [
    ACCELERATE,
    BITSANDBYTES,
    "datasets>=5.2",
    "matplotlib>=3.11",
    "peft>=0.21",
    "pyyaml",
    "tensorboard",
    "trl>=1.16",
]
VIDEO = ["av>=18.1"]
NOTEBOOK_TESTS = ["ipykernel>=7.4", "nbclient>=0.11", "nbformat>=5.11"]
VLLM = ["vllm>=0.32,<0.34"]  # as in serving/__init__.py


class BuildModules(build_py):
    """Keeps this file out of the package, whose folder it is in."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Find the modules as setuptools does, without `setup`."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    name="flashsloth",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1),
    description="FlashSloth, a small and fast vision-language model, for transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=[
        "huggingface_hub",
        "jinja2>=3.1",
        "numpy>=2",
        "packaging",
        "pillow>=12",
        "safetensors",
        "tokenizers",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "demo": DEMO,
        "eval": EVALUATION,
        "flash-attn": ["flash-attn"],
        "lint": LINT,
        "onnx": ONNX,
        "quantization": QUANTIZATION,
        "serve": SERVING,
        "test": [
            *DEMO,
            *EVALUATION_TESTS,
            *LINT,
            *NOTEBOOK_TESTS,
            *ONNX,
            *QUANTIZATION,
            *SERVING,
            *TRAINING,
            *VIDEO,
            "optimum-quanto",
            "pytest",
            "pytest-xdist",
            "resvg-py>=0.5",
            "selenium",
        ],
        "train": TRAINING,
        "video": VIDEO,
        "vllm": VLLM,
    },
    packages=["flashsloth", *(f"flashsloth.{name}" for name in ("cli", "evaluation", "serving", "training"))],
    package_dir={"flashsloth": "."},
    package_data={"flashsloth": [*CHECKPOINT, *EXAMPLES, "LICENSE", "py.typed"]},
    exclude_package_data={"flashsloth.cli": ["*.pyi"]},  # Gradio writes them next to its components
    cmdclass={"build_py": BuildModules},
    entry_points={
        "console_scripts": ["flashsloth = flashsloth.cli:main"],
        "lmms_eval.models": ["flashsloth = flashsloth.evaluation:manifest"],
        "vllm.general_plugins": ["flashsloth = flashsloth.serving:register"],
    },
)
