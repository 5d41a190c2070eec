"""Devices by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_fast.errors import UsageError

if TYPE_CHECKING:
    import torch


def device_of(name: str) -> torch.device:
    """Return the device `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if there is one.

    Raises:
        UsageError: no such device, or none that weights can live on.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device `{name}` is not known", "write cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device `{name}` is not supported", "write cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device `{name}` does not exist: PyTorch sees {torch.cuda.device_count()} GPUs",
            "write cpu or auto",
        )
    return device
