"""Which weights share a scale: whole tensor, row, group of columns, or block. For formats with one code per element.

Axes: O = out_features, I = in_features. Weight [o, i] has the scale [o // rows, i // columns]; blocks at the right and
bottom edges may be partial and have scales of their own. Names of the strategies and of the config's keys are those of
the compressed-tensors library (0.20).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import SCALE_DTYPES, check_finite, row_chunks

_KNOWN_KEYS = frozenset(
    {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
    | {"scale_dtype", "zp_dtype"}  # the tensors themselves say these
    | {"observer", "observer_kwargs"}  # how the numbers were found
)
_NEUTRAL_ORDERS = (None, False, "weight", "static")  # these order columns only while quantizing


@dataclass(frozen=True)
class ScaleGrid:
    """rows, columns: how many of each share one scale; None = all of them."""

    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("columns", self.columns)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise FormatError(f"{name} per scale: found {value!r}, wanted a whole number above 0")

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Scales that a weight [O, I] has, partial blocks included."""
        rows, columns = self.rows or out_features, self.columns or in_features
        return (-(-out_features // rows), -(-in_features // columns))

    def check(self, scale: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
        """`scale` as [scale rows, scale columns] for a weight of `shape`. Raises FormatError for another count.

        A single scale may be stored as [], [1] or [1, 1], row scales as [O] or [O, 1].
        """
        wanted = self.shape(*shape)
        found = tuple(scale.shape)
        flat = scale.dim() < 2 and (self.columns is None or wanted == (1, 1)) and scale.numel() == wanted[0] * wanted[1]
        if found != wanted and not flat:
            raise FormatError(
                f"{name}: found shape {list(found)}, wanted {list(wanted)} for a weight {list(shape)} with one scale "
                f"for {self.describe()}"
            )
        return scale.reshape(wanted)

    def describe(self) -> str:
        if self.rows is None and self.columns is None:
            return "the whole tensor"
        if self.columns is None:
            return "each row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.columns} columns of a row" if self.rows == 1 else f"blocks of {self.rows} x {self.columns}"

    def spread(self, scale: Tensor, rows: slice, in_features: int) -> Tensor:
        """Scales of the weight rows `rows`, to be broadcast: [1 or n, 1 or I]."""
        if self.rows is not None:
            index = torch.arange(rows.start, rows.stop, device=scale.device) // self.rows
            scale = scale.index_select(0, index)
        if self.columns is not None:
            scale = scale.repeat_interleave(self.columns, 1)[:, :in_features]
        return scale


TENSOR = ScaleGrid(None, None)
CHANNEL = ScaleGrid(1, None)


def scale_codes(codes: Tensor, scale: Tensor, grid: ScaleGrid, zero_point: Tensor | None = None) -> Tensor:
    """(codes - zero_point) * scale in float32.

    codes:             [O, I] any dtype that float32 holds exactly
    scale, zero_point: as ScaleGrid.check returns them
    returns:           [O, I] float32
    """
    out_features, in_features = codes.shape
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=codes.device)
    scale = scale.float()
    zero_point = None if zero_point is None else zero_point.float()
    for rows in row_chunks(out_features, in_features, codes.device):
        values = dense[rows].copy_(codes[rows])
        if zero_point is not None:
            values -= grid.spread(zero_point, rows, in_features)
        values *= grid.spread(scale, rows, in_features)
    return dense


def check_scale(scale: Tensor, name: str, grid: ScaleGrid, shape: tuple[int, int]) -> Tensor:
    """A float scale that fits a weight of `shape`, [O, I], finite, as `ScaleGrid.check` returns it. Raises
    FormatError."""
    if scale.dtype not in SCALE_DTYPES:
        raise FormatError(f"{name}: found {scale.dtype}, wanted {' or '.join(str(dtype) for dtype in SCALE_DTYPES)}")
    scale = grid.check(scale, name, shape)
    check_finite(scale, name)
    return scale


def read_bits(weights: Mapping[str, Any], type_: str, bits: Sequence[int]) -> int:
    """`num_bits` of the `weights` entry of a config group, after checks of what holds for every unpacked format.

    Raises FormatError for a type, bit width or key that the format does not have.
    """
    for key, value in weights.items():
        if key not in _KNOWN_KEYS and value is not None:
            raise FormatError(f"weights.{key}: found {value!r}, known keys: {', '.join(sorted(_KNOWN_KEYS))}")
    found_type = _get(weights, "type", "int")
    if found_type != type_:
        raise FormatError(f"weights.type: found {found_type!r}, wanted {type_!r} for what is stored")
    if _get(weights, "dynamic", False) is not False:
        raise FormatError(f"weights.dynamic: found {weights['dynamic']!r}, wanted false: weights are stored")
    if weights.get("actorder") not in _NEUTRAL_ORDERS:
        raise FormatError(f"weights.actorder: found {weights['actorder']!r}, wanted null, 'weight' or 'static'")
    num_bits = _get(weights, "num_bits", 8)
    if isinstance(num_bits, bool) or num_bits not in bits:
        raise FormatError(
            f"weights.num_bits: found {num_bits!r}, wanted {' or '.join(map(str, bits))} for what is stored"
        )
    return int(num_bits)


def read_symmetric(weights: Mapping[str, Any]) -> bool:
    """`symmetric`; true where absent. Raises FormatError for anything but true and false."""
    symmetric = _get(weights, "symmetric", True)
    if not isinstance(symmetric, bool):
        raise FormatError(f"weights.symmetric: found {symmetric!r}, wanted true or false")
    return symmetric


def read_grid(weights: Mapping[str, Any]) -> ScaleGrid:
    """The grid of a `weights` entry: `strategy` with `group_size` or `block_structure`; without a strategy the group
    size says it. Raises FormatError where they do not fit together."""
    group_size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:
        if block is not None:
            strategy = "block"
        else:
            strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy == "tensor":
        return TENSOR
    if strategy == "channel":
        if group_size not in (None, -1):
            raise FormatError(f"weights.group_size: found {group_size!r}, wanted null with strategy 'channel'")
        return CHANNEL
    if strategy == "group":
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise FormatError(f"weights.group_size: found {group_size!r}, wanted >= 1 with strategy 'group'")
        return ScaleGrid(1, group_size)
    if strategy == "block":
        return block_grid(block, "weights.block_structure")
    raise FormatError(f"weights.strategy: found {strategy!r}, wanted 'tensor', 'channel', 'group' or 'block'")


def block_grid(block: object, name: str) -> ScaleGrid:
    """A grid from [128, 128] or "128x128", rows first. Raises FormatError for anything else."""
    sizes: list[Any] = list(block) if isinstance(block, (list, tuple)) else []
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        sizes = [int(size) for size in block.split("x")]
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise FormatError(f"{name}: found {block!r}, wanted two sizes above 0 such as [128, 128]")
    return ScaleGrid(sizes[0], sizes[1])


def _get(config: Mapping[str, Any], key: str, default: object) -> Any:
    value = config.get(key)
    return default if value is None else value
