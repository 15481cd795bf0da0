"""Default device and dtype of commands, examples and benchmarks."""

import torch

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, and of Arm


def default_device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def choose_device(name: str | None = None) -> torch.device:
    """The device with this name, or the default device.

    Args:
        name: Such as `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    if name is None:
        return default_device()
    found = {"cpu": 1}
    if torch.accelerator.is_available():
        found[torch.accelerator.current_accelerator().type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
        is_there = (device.index or 0) < found.get(device.type, 0)
    except RuntimeError:  # not a name that PyTorch knows
        is_there = False
    if not is_there:
        known = [f"{kind}:{index}" for kind, number in found.items() for index in range(number) if kind != "cpu"]
        raise ValueError(f"there is no device {name!r}; PyTorch finds {', '.join(['cpu', *known])} on this machine.")
    return device


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
