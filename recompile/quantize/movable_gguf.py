"""What may move in a GGUF file: the float scales inside its blocks (of a row, in some types), norms and biases.

A weight of any type is linear in these: W = sum over its fields f of f * code(f), so what a field brings to a weight is
what decodes while the others are zero. Fields that multiply codes move by their logarithm; the minima of Q4_1 and Q5_1,
which may have any sign, in steps of the scales' size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import GgufCheckpoint, StoredModule, TensorInfo
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_types import TYPES, GgufType
from recompile.formats.ik import TYPES as IK_TYPES
from recompile.gguf.names import Place, steps_of
from recompile.gguf.values import row_order
from recompile.quantize.movable import Movable, parts_of_joined, size_of

# Steps that change the order or the shape of values alone.
KEEPS_VALUES = frozenset({"turned", "conv", "one_row", "column", "value_rows", "value_columns", "value_heads"})


@dataclass(frozen=True)
class BlockField:
    """Floats at one place of every block, or at the start of every row.

    name, offset: in bytes; count: of them, one after another, each for as many weights; in_row: at the row's start
    added: to every weight, and not multiplied by codes
    """

    name: str
    offset: int
    dtype: torch.dtype = torch.float16
    count: int = 1
    in_row: bool = False
    added: bool = False

    def slice_of(self, kind: GgufType, rows: Tensor) -> Tensor:
        """A view of its bytes: uint8 [rows, row bytes] -> [rows, places, bytes]."""
        size = self.count * self.dtype.itemsize
        if self.in_row:
            return rows[:, None, self.offset : self.offset + size]
        blocks = rows[:, kind.head_bytes :].unflatten(1, (-1, kind.block_bytes))
        return blocks[:, :, self.offset : self.offset + size]

    def read(self, kind: GgufType, rows: Tensor) -> Tensor:
        """[rows, places * count] of `dtype`."""
        return self.slice_of(kind, rows).contiguous().view(self.dtype).flatten(1)

    def write(self, kind: GgufType, rows: Tensor, value: Tensor) -> None:
        """The reverse of `read`: value, [rows, places * count] of `dtype`, into rows, uint8 [rows, row bytes]."""
        into = self.slice_of(kind, rows)
        into.copy_(value.contiguous().view(torch.uint8).view(into.shape))


def _d(offset: int = 0) -> tuple[BlockField, ...]:
    return (BlockField("d", offset),)


FIELDS: dict[str, tuple[BlockField, ...]] = {
    **{name: _d() for name in ("Q4_0", "Q5_0", "Q8_0", "Q6_0", "Q1_0", "IQ4_NL", "IQ4_XS", "IQ1_S")},
    **{name: _d() for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")},
    **{name: (BlockField("d", 0), BlockField("m", 2, added=True)) for name in ("Q4_1", "Q5_1")},
    **{name: (BlockField("d", 0), BlockField("dmin", 2)) for name in ("Q4_K", "Q5_K")},
    "Q2_K": (BlockField("d", 80), BlockField("dmin", 82)),
    "Q3_K": _d(108),
    "Q6_K": _d(208),
    "TQ1_0": _d(52),
    "TQ2_0": _d(64),
    "NVFP4": (BlockField("d", 0, torch.float8_e4m3fn, 4),),
    **{
        name: (BlockField("d", 0, torch.float32 if row.head_bytes == 4 else torch.float16, in_row=row.head_bytes > 0),)
        for name, row in IK_TYPES.items()
    },
}


@dataclass
class FieldMovable(Movable):
    """A field of a quantized tensor. start, delta: [rows, fields of a row], rows as the file has them."""

    build: GgufCheckpoint = field(kw_only=True, repr=False)
    info: TensorInfo = field(kw_only=True)
    field_of: BlockField = field(kw_only=True)

    @property
    def kind(self) -> GgufType:
        return TYPES[self.info.dtype]

    @property
    def is_vector(self) -> bool:
        return False

    @property
    def as_the_model(self) -> bool:
        return True  # what the file turns is turned back with its other steps

    @property
    def is_whole(self) -> bool:
        return False

    def in_file(self, info: TensorInfo, stored: Tensor | None = None) -> Tensor:
        assert stored is not None, "only a part of it moves"
        rows = stored.reshape(-1, self.kind.row_bytes(info.shape[-1])).clone()
        self.field_of.write(self.kind, rows, self.stored.to(rows.device))
        return rows.view(stored.shape)

    def gradient(self, weight: Tensor | None, gradient: Tensor) -> Tensor:
        """d loss / d delta; gradient: of the weight as the model has it."""
        here = as_stored(self.build, self.tensor, gradient.float()).reshape(len(self.start), -1)
        if self.added:
            return self._sums(here) * self.unit
        if len(FIELDS[self.kind.name]) == 1:
            assert weight is not None, "scales are asked for with their weight"
            return self._sums(here * as_stored(self.build, self.tensor, weight.float()).reshape(here.shape))
        return self._sums(here * self._alone(here.device))

    def _alone(self, device: torch.device) -> Tensor:
        """What the field brings to the weights, float32 [rows, columns]."""
        columns = self.info.shape[-1]
        rows = self.in_file(self.info, read_tensor(self.info, device)).view(-1, self.kind.row_bytes(columns))
        for other in FIELDS[self.kind.name]:
            if other != self.field_of:
                other.slice_of(self.kind, rows).zero_()
        return dequantize_rows(self.kind, rows, columns)

    def _sums(self, product: Tensor) -> Tensor:
        return product.unflatten(1, (self.start.shape[1], -1)).sum(2)


@dataclass
class VectorMovable(Movable):
    """A norm or a bias of a GGUF file, in the file's order; its gradient comes in the model's."""

    build: GgufCheckpoint = field(kw_only=True, repr=False)

    def gradient(self, weight: Tensor | None, gradient: Tensor) -> Tensor:
        return super().gradient(weight, as_stored(self.build, self.tensor, gradient).reshape(self.start.shape))


def as_stored(build: GgufCheckpoint, tensor: str, gradient: Tensor) -> Tensor:
    """A gradient of a tensor of the model, [rows, ...], in the order of the file; `offset` does not change it."""
    place = build.places.get(tensor, Place(tensor))
    if place.heads:
        gradient = gradient[row_order(gradient.shape[0], place.heads, back=False)]
    if place.steps:
        assert build.heads is not None, "places are those of known architectures"
        for step in steps_of(place, build.heads):
            gradient = step.to_gguf(gradient)
    return gradient


def find_gguf_movables(build: GgufCheckpoint, device: str | torch.device = "cpu") -> dict[str, Movable]:
    """By name of the tensor, with the name of the field where it is one. Left out: the embedding, types without a float
    in their blocks, parts of tensors that the model has in one piece, and values that conversion changes."""
    joined = parts_of_joined(build)
    found: dict[str, Movable] = {}
    for module in build.modules.values():
        for info in module.parts.values():
            if info.name in joined or not set(build.places.get(info.name, Place("")).steps) <= KEEPS_VALUES:
                continue
            if info.dtype in FIELDS and role_of(module.name) != "embedding":
                for movable in _fields_of(build, module, info, device):
                    found[f"{info.name}:{movable.field_of.name}"] = movable
            elif TYPES[info.dtype].is_float and len(info.shape) == 1:
                value = read_tensor(info, device)
                start = value.float()
                found[info.name] = VectorMovable(info.name, start, value.dtype, None, size_of(start), build=build)
    return found


def _fields_of(
    build: GgufCheckpoint, module: StoredModule, info: TensorInfo, device: str | torch.device
) -> list[FieldMovable]:
    kind = TYPES[info.dtype]
    rows = read_tensor(info, device).reshape(-1, kind.row_bytes(info.shape[-1]))
    found = []
    for place in FIELDS[kind.name]:
        value = place.read(kind, rows)
        start = value.float()
        unit = size_of(FIELDS[kind.name][0].read(kind, rows).float() if place.added else start)
        found.append(
            FieldMovable(info.name, start, value.dtype, None, unit, place.added, build=build, info=info, field_of=place)
        )
    return found
