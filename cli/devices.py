"""The device and the dtype that commands, examples and benchmarks run a model with."""

import torch

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, and of Arm


def default_device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions that multiply bfloat16 matrices.

    A CPU without them emulates them, several times slower than float32. A PyTorch that cannot tell (before
    `torch.cpu.get_capabilities`) counts as one without.
    """
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def working_dtype(device: torch.device | str) -> torch.dtype | str:
    """The `dtype` to load a model with: "auto", the checkpoint's, or float32 on a CPU that has no bfloat16."""
    return "auto" if has_bfloat16(device) else torch.float32
