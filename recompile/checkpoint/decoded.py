"""A quantized checkpoint as the dense model that it stands for: its weights are decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from recompile.errors import UnsupportedError
from recompile.formats import FORMATS, mlx_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOWHERE = -1  # offset of a tensor that lies in no file: whoever tries to copy its bytes is told


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """`tensors` are those of the dense model; a decoded weight has the dtype BF16 and no place in a file.

    `load` gives what the stored parts mean, as `stored.load` does; `read` rounds that to BF16, which is what a build
    that leaves the weight dense holds.
    """

    stored: Checkpoint = field(kw_only=True, repr=False)

    @cached_property
    def quantization_config(self) -> Mapping[str, object]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        return self.stored.fingerprint

    @cached_property
    def identity(self) -> str:
        return self.stored.identity

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        import torch

        info = self.tensors.get(tensor)
        if info is None or info.offset != NOWHERE:
            return self.stored.read(tensor, device)
        return self.stored.load(tensor, device=device).to(torch.bfloat16)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        return self.stored.load(tensor, device=device)


def as_dense(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it is dense, else as the dense model that it stands for.

    Raises UnsupportedError for a quantized one whose true shapes stand in no file (EXL2, EXL3), and for a GGUF file."""
    if not checkpoint.is_quantized:
        return checkpoint
    padded = [name for name in checkpoint.formats if FORMATS[name].pads_to is not None]
    if padded or isinstance(checkpoint, GgufCheckpoint):
        what = padded[0] if padded else "GGUF"
        raise UnsupportedError(
            f"{checkpoint.label}: is a {what} build; take the model that it was made from as the base"
            if padded
            else f"{checkpoint.label}: is a quantized GGUF file; take one of F16, BF16 or F32 as the base"
        )
    tensors: dict[str, TensorInfo] = {}
    for module in checkpoint.modules.values():
        if not module.is_quantized:
            tensors.update({info.name: info for info in module.parts.values()})
            continue
        assert module.shape is not None, "only padded formats have none"
        count = 1
        for size in module.shape:
            count *= size
        first = next(iter(module.parts.values()))
        name = module.dense_name
        tensors[name] = TensorInfo(name, "BF16", tuple(module.shape), first.path, NOWHERE, 2 * count)
        if "bias" in module.parts:
            tensors[module.parts["bias"].name] = module.parts["bias"]
    config = {key: value for key, value in checkpoint.config.items() if key not in mlx_config.KEYS}
    return DecodedCheckpoint(
        checkpoint.path,
        checkpoint.label,
        config,
        tensors,
        (*checkpoint.notes, base_note(checkpoint)),
        stored=checkpoint,
    )


def base_note(checkpoint: Checkpoint) -> str:
    """What is said of a base that is quantized itself."""
    return (
        f"{checkpoint.label}: the base is itself quantized ({', '.join(checkpoint.formats)}); its weights are decoded, "
        f"and every figure is against what they decode to"
    )
