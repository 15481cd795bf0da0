"""Default device and dtype of commands, examples and benchmarks."""

import torch

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, and of Arm


def default_device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware.

    A CPU that does not is several times slower in bfloat16 than in float32. If PyTorch is too old to tell (it has no
    `torch.cpu.get_capabilities`), the answer is False for every CPU.

    Args:
        device: The device.
    """
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def working_dtype(device: torch.device | str) -> torch.dtype | str:
    """The `dtype` to load a model with: "auto", which keeps the checkpoint's, or float32 on a CPU without bfloat16.

    Args:
        device: The device that will run the model.
    """
    return "auto" if has_bfloat16(device) else torch.float32
