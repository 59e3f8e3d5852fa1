"""Compute dtypes and devices by the names that people give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recompile.errors import ArgumentError

if TYPE_CHECKING:
    import torch


BATCH_TOKENS = 512  # a CPU's cache keeps the activations of so many; a layer of more is slower by a sixth
DEVICE_BATCH_TOKENS = 4096


def batch_rows(device: torch.device, row_tokens: int) -> int:
    """Rows that run through a layer together."""
    return max(1, (BATCH_TOKENS if device.type == "cpu" else DEVICE_BATCH_TOKENS) // row_tokens)


def compute_dtype(name: str | None) -> torch.dtype | None:
    """ "bfloat16" -> torch.bfloat16; None: the device's default. Raises ArgumentError."""
    if name is None:
        return None
    from recompile.model.stream import DTYPES

    if name not in DTYPES:
        raise ArgumentError(f"{{dtype}} {name}: wanted one of {', '.join(DTYPES)}")
    return DTYPES[name]


def compute_device(name: str) -> str:
    """ "0" -> "cuda:0". Raises ArgumentError where the device is not there."""
    import torch

    device = f"cuda:{name}" if name.isdigit() else name
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(
            f'{{device}} {name}: not a device; wanted cpu, cuda:0, or a number ("0" is cuda:0)'
        ) from error
    if found.type == "meta":
        raise ArgumentError(f"{{device}} {name}: holds no values to compute with; use {{device}} cpu")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ArgumentError(
            f"{{device}} {name}: this machine offers {torch.cuda.device_count()} CUDA devices; use {{device}} cpu"
        )
    if found.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=found).item()
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            reason = (str(error).strip().splitlines() or ["it computes nothing"])[0][:200]
            raise ArgumentError(f"{{device}} {name}: cannot be used here: {reason}; use {{device}} cpu") from error
    return device
