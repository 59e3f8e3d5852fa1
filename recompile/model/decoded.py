"""A quantized checkpoint as the dense model that it stands for: its weights are decoded when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo, no_table_of_names
from recompile.errors import UnsupportedError
from recompile.formats import DTYPE_BYTES, FLOAT_DTYPES, FORMATS, mlx_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOWHERE = -1  # offset of a tensor that lies in no file: whoever tries to copy its bytes is told


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """`tensors` are those of the dense model; a decoded weight has the dtype BF16 and no place in a file.

    `load` gives what the stored parts mean, as `stored.load` does; `read` rounds that to the dtype that `tensors` say,
    which is what a build that leaves the weight dense holds.

    slices: tensors that are rows (first, last) of a stored one; turned: weights that a dense checkpoint of this model
    stores as [in, out] and the stored one, quantized, as [out, in]
    """

    stored: Checkpoint = field(kw_only=True, repr=False)
    slices: Mapping[str, tuple[str, int, int]] = field(default_factory=dict, kw_only=True, repr=False)
    turned: frozenset[str] = field(default=frozenset(), kw_only=True, repr=False)

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
        from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

        info = self.tensors.get(tensor)
        if info is None or info.offset != NOWHERE:
            return self.stored.read(tensor, device)
        return self.load(tensor, device=device).to(TORCH_DTYPES[info.dtype])

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        if tensor in self.slices:
            whole, first, last = self.slices[tensor]
            return self.stored.load(whole, device=device)[first:last]
        value = self.stored.load(tensor, device=device)
        return value.T.contiguous() if tensor in self.turned else value


def as_dense(checkpoint: Checkpoint, *, to_gguf: bool = False) -> Checkpoint:
    """The checkpoint itself if it is dense, else as the dense model that it stands for; a GGUF file, dense or not, as
    the Hugging Face checkpoint that it stands for.

    to_gguf: for a build that is a GGUF file again: such a base stays as it is, its rows are decoded one by one

    Raises UnsupportedError for a quantized one whose true shapes stand in no file (EXL2, EXL3), and for a GGUF file of
    an architecture without a table of names."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint if to_gguf else _gguf_as_dense(checkpoint)
    if not checkpoint.is_quantized:
        return checkpoint
    padded = [name for name in checkpoint.formats if FORMATS[name].pads_to is not None]
    if padded:
        raise UnsupportedError(
            f"{checkpoint.label}: is a {padded[0]} build; take the model that it was made from as the base"
        )
    turned = turned_weights(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    for module in checkpoint.modules.values():
        if not module.is_quantized:
            tensors.update({info.name: info for info in module.parts.values()})
            continue
        assert module.shape is not None, "only padded formats have none"
        name, shape = module.dense_name, tuple(module.shape)
        tensors[name] = _decoded(name, shape[::-1] if name in turned else shape, next(iter(module.parts.values())).path)
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
        turned=turned,
    )


def turned_weights(source: Checkpoint) -> frozenset[str]:
    """The quantized weights that the dense model stores as [in, out] (GPT-2's): quantized ones are [out, in] in every
    format."""
    from recompile.model.roles import turned_modules

    modules = source.modules
    return frozenset(
        modules[name].dense_name for name in turned_modules(source) if name in modules and modules[name].is_quantized
    )


def _decoded(name: str, shape: tuple[int, ...], path: Path, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, path, NOWHERE, DTYPE_BYTES[dtype] * math.prod(shape))


def _gguf_as_dense(checkpoint: GgufCheckpoint) -> DecodedCheckpoint:
    """Under Hugging Face's names, experts one by one; values in its order of rows, without what GGUF adds to norms."""
    if checkpoint.heads is None:
        raise UnsupportedError(
            f"{checkpoint.label}: {no_table_of_names(checkpoint.file.value('general.architecture'))}"
        )
    turned = turned_weights(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    slices: dict[str, tuple[str, int, int]] = {}
    parts: dict[str, None] = {}
    for whole in checkpoint.joined.values():
        names = [name for part in whole.parts for name in part]
        if not whole.stacked:
            parts |= dict.fromkeys(names)
            first = checkpoint.tensors[names[0]]
            tensors[whole.name] = _decoded(whole.name, checkpoint.joined_shape(whole), first.path, _dense_dtype(first))
    for name, info in checkpoint.tensors.items():
        if name not in checkpoint.places or name in parts:  # rotary factors, which config.json says
            continue
        dtype = _dense_dtype(info)
        if ".experts." in name and name.endswith(".gate_up_proj.weight"):  # one expert's, in files of Gemma 4
            rows, columns = info.shape
            for number, leaf in enumerate(("gate_proj", "up_proj")):
                half = name.replace("gate_up_proj", leaf)
                slices[half] = (name, number * rows // 2, (number + 1) * rows // 2)
                tensors[half] = _decoded(half, (rows // 2, columns), info.path, dtype)
        else:
            shape = info.shape[::-1] if name in turned else info.shape
            tensors[name] = _decoded(name, shape, info.path, dtype)
    notes = (*checkpoint.notes, base_note(checkpoint)) if checkpoint.is_quantized else checkpoint.notes
    return DecodedCheckpoint(
        checkpoint.path,
        checkpoint.label,
        checkpoint.config,
        tensors,
        notes,
        stored=checkpoint,
        slices=slices,
        turned=turned,
    )


def _dense_dtype(info: TensorInfo) -> str:
    return info.dtype if info.dtype in FLOAT_DTYPES else "BF16"


def base_note(checkpoint: Checkpoint) -> str:
    """What is said of a base that is quantized itself."""
    return (
        f"{checkpoint.label}: the base is itself quantized ({', '.join(checkpoint.formats)}); its weights are decoded, "
        f"and every figure is against what they decode to"
    )
