"""What conversion to GGUF does to the values of a tensor, and back: reordered rows, -exp, splits of fused tensors.

Functions of one torch tensor, or of one expert of a stack; torch is not imported before one is called. Sources: the
definitions in transformers' modeling files and files that llama.cpp's converter wrote, with which tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recompile.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Sizes of a model that the order of rows depends on.

    query, key:          attention heads of queries and keys
    linear_key, _value:  heads of linear attention; head_value: rows of one of its value heads; head_key: of a key head
    nope, value, rank:   of multi-head latent attention: rows a head without position, value rows a head, latent width
    hidden:              width of the states between layers
    groups:              of a state space's norm
    size, turned:        rows of a head, and how many of them turn in pairs that lie side by side and apart in GGUF
    """

    query: int
    key: int
    linear_key: int = 0
    linear_value: int = 0
    head_key: int = 0
    head_value: int = 0
    nope: int = 0
    value: int = 0
    rank: int = 0
    hidden: int = 0
    groups: int = 1
    size: int = 0
    turned: int = 0


def row_order(rows: int, heads: int, *, back: bool) -> list[int]:
    """Which row goes where: new[i] = old[order[i]]. To GGUF the two halves of a head are interleaved; `back` undoes it.

    rows: heads * head_dim, head_dim even. Raises UnsupportedError where the rows are not whole heads.
    """
    if heads < 1 or rows % (2 * heads):
        raise UnsupportedError(
            f"{rows} rows cannot be reordered for {heads} heads: a head must be a whole, even number of rows"
        )
    size = rows // heads
    half = size // 2
    order = []
    for start in range(0, rows, size):
        if back:
            order += [start + 2 * i + j for j in range(2) for i in range(half)]
        else:
            order += [start + j * half + i for i in range(half) for j in range(2)]
    return order


def _qkv_rows(heads: Heads, rows: int) -> tuple[int, int, int]:
    """How many of fused rows are queries, keys and values, one after another. Raises UnsupportedError where they are
    not whole heads."""
    count = heads.query + 2 * heads.key
    if rows % count:
        raise UnsupportedError(f"{rows} rows are not those of {heads.query} queries and {heads.key} keys and values")
    size = rows // count
    return heads.query * size, heads.key * size, heads.key * size


def _qkv_order(heads: Heads, rows: int, *, back: bool) -> list[int]:
    """Rows of fused queries, keys and values: Hugging Face has for each key head its queries, its key and its value,
    GGUF all queries, all keys, all values. Raises UnsupportedError where the rows are not whole heads."""
    count, each = heads.query + 2 * heads.key, heads.query // heads.key + 2
    if rows % count or heads.query % heads.key:
        raise UnsupportedError(f"{rows} rows are not those of {heads.query} queries and {heads.key} keys and values")
    size = rows // count
    groups = [range(first, first + each) for first in range(0, count, each)]
    blocks = [block for group in groups for block in group[:-2]]
    blocks += [group[-2] for group in groups] + [group[-1] for group in groups]
    order = [block * size + i for block in blocks for i in range(size)]
    return sorted(range(rows), key=order.__getitem__) if back else order


# ---- steps: one tensor to one tensor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One change of values; `shape` is that of the Hugging Face tensor, given GGUF's."""

    to_gguf: Callable[[Tensor], Tensor]
    to_hf: Callable[[Tensor], Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape


def _value_head_order(heads: Heads, *, back: bool) -> list[int]:
    """Value heads of linear attention: Hugging Face has those of one key head together, GGUF one of each key head."""
    keys, each = heads.linear_key, heads.linear_value // heads.linear_key
    if back:
        return [each_one * keys + key for key in range(keys) for each_one in range(each)]
    return [key * each + each_one for each_one in range(each) for key in range(keys)]


def _value_rows(heads: Heads, rows: int, size: int, *, back: bool) -> list[int]:
    """The order of `rows` rows of which the last ones are value heads of `size` rows each."""
    first = rows - heads.linear_value * size
    return [
        *range(first),
        *(first + head * size + i for head in _value_head_order(heads, back=back) for i in range(size)),
    ]


def _reorder_values(heads: Heads, size: int, axis: int = 0) -> Step:
    def change(value: Tensor, back: bool) -> Tensor:
        order = _value_rows(heads, value.shape[axis], size, back=back)
        return value[order] if axis == 0 else value[:, order]

    return Step(lambda value: change(value, False), lambda value: change(value, True))


def _halves(value: Tensor, heads: Heads, *, back: bool) -> Tensor:
    """The rows of a head that turn are pairs side by side in Hugging Face; GGUF has all first rows, then all second."""
    if not heads.turned:
        return value
    order = [*range(0, heads.turned, 2), *range(1, heads.turned, 2), *range(heads.turned, heads.size)]
    if back:
        order = sorted(range(heads.size), key=order.__getitem__)
    return value[[start + row for start in range(0, value.shape[0], heads.size) for row in order]]


def make_step(name: str, heads: Heads) -> Step:
    """A step by its name in the table of architectures."""
    if name == "neg_exp":  # A_log -> A
        return Step(lambda value: -value.float().exp(), lambda value: (-value.float()).log())
    if name == "conv":  # [channels, 1, width] -> [channels, width]
        return Step(
            lambda value: value.reshape(value.shape[0], -1),
            lambda value: value.reshape(value.shape[0], 1, -1),
            lambda shape: (shape[0], 1, shape[-1]),
        )
    if name == "conv_3d":  # the same, with an axis of one in GGUF as well
        return Step(
            lambda value: value,
            lambda value: value.reshape(-1, 1, value.shape[-1]),
            lambda shape: (math.prod(shape[:-1]), 1, shape[-1]),
        )
    if name == "halves":
        return Step(lambda value: _halves(value, heads, back=False), lambda value: _halves(value, heads, back=True))
    if name == "upright":  # [heads] -> [heads, 1]
        return Step(
            lambda value: value.reshape(-1, 1), lambda value: value.reshape(-1), lambda shape: (math.prod(shape),)
        )
    if name == "groups":  # [width] -> [groups, width / groups]
        return Step(
            lambda value: value.reshape(heads.groups, -1),
            lambda value: value.reshape(-1),
            lambda shape: (math.prod(shape),),
        )
    if name in ("one_row", "column"):  # a vector of its own, which Hugging Face keeps as a matrix of one row
        return Step(
            (lambda value: value.reshape(-1)) if name == "one_row" else (lambda value: value),
            lambda value: value.reshape(1, -1),
            lambda shape: (1, shape[-1]),
        )
    if name == "turned":  # [in, out] in Hugging Face
        return Step(
            lambda value: value.T,
            lambda value: value.reshape(value.shape[1], value.shape[0]).T,  # the bytes of GGUF's, read in this shape
            lambda shape: (shape[1], shape[0]),
        )
    if name == "qkv_groups":
        return Step(
            lambda value: value[_qkv_order(heads, value.shape[0], back=False)],
            lambda value: value[_qkv_order(heads, value.shape[0], back=True)],
        )
    if name in ("query_pairs", "key_pairs"):  # of a fused tensor, in place of an architecture that is `permuted`
        count = heads.query if name == "query_pairs" else heads.key
        return Step(
            lambda value: value[row_order(value.shape[0], count, back=False)],
            lambda value: value[row_order(value.shape[0], count, back=True)],
        )
    if name == "value_rows":
        return _reorder_values(heads, heads.head_value)
    if name == "value_columns":
        return _reorder_values(heads, heads.head_value, axis=1)
    assert name == "value_heads", name
    return _reorder_values(heads, 1)


# ---- joins: several GGUF tensors that are one in Hugging Face's checkpoint -------------------------------------------


def _is_turned(how: str, shape: Sequence[int], heads: Heads) -> bool:
    """Whether a fused tensor is [in, out]. Where checkpoints of both kinds are about, the side that is as wide as the
    states between layers decides; with two such sides it is not turned, as transformers reads it."""
    if how == "wide_in":
        return shape[1] != heads.hidden
    if how == "wide_out":
        return shape[0] != heads.hidden
    return how.endswith("_turned")


def _turned(value: Tensor) -> Tensor:
    return value.transpose(0, 1) if value.dim() == 2 else value


def split_one(how: str, value: Tensor, part: int, count: int, heads: Heads) -> Tensor:
    """Part `part` of `count` of a Hugging Face tensor [rows, in] (of one expert), as GGUF has it: [its rows, in], of
    "kv_b" [heads, ..., ...]. how: a key of `Fused`."""
    if how == "kv_b":  # [heads * (nope + value), rank]: keys are kept transposed, head by head
        whole = value.reshape(heads.query, heads.nope + heads.value, -1)
        return whole[:, : heads.nope].transpose(1, 2) if part == 0 else whole[:, heads.nope :]
    if how == "qkv":
        return value.split(_qkv_rows(heads, value.shape[0]))[part]
    if how == "qkvz":  # for each key head its q, k, v and z rows -> all q, all k, all v; z apart
        kept = _qkvz_parts(value, heads)
        rows = kept[3:] if part else kept[:3]
        return _concatenate([piece.reshape(-1, value.shape[-1]) for piece in rows])
    value = _turned(value) if _is_turned(how, value.shape, heads) else value
    if how.startswith("alternate"):
        return value[part::count]
    if value.shape[0] % count:
        raise UnsupportedError(f"{value.shape[0]} rows cannot be split in {count} equal parts")
    return value.chunk(count)[part]


BY_HEAD = "by_head"  # `how` of what mlx-lm keeps in one matrix a head; no GGUF file does


def join_one(how: str, parts: Sequence[Tensor], heads: Heads | None) -> Tensor:
    """The reverse of `split_one`, given all parts: [rows, in]; of one head for BY_HEAD, which asks for no `heads`."""
    import torch

    if how == BY_HEAD:  # keys [rank, nope], values [value, rank]
        return torch.cat((parts[0].T, parts[1]))
    assert heads is not None, "parts are those of known architectures"
    if how == "kv_b":
        key_rows = parts[0].reshape(heads.query, -1, heads.nope).transpose(1, 2)
        value_rows = parts[1].reshape(heads.query, heads.value, -1)
        return torch.cat((key_rows, value_rows), 1).reshape(-1, key_rows.shape[-1])
    if how == "qkvz":
        columns = parts[0].shape[-1]
        keys = heads.linear_key * heads.head_key
        q, k, v = parts[0].split((keys, keys, parts[0].shape[0] - 2 * keys))
        pieces = [piece.reshape(heads.linear_key, -1, columns) for piece in (q, k, v, parts[1])]
        return torch.cat(pieces, 1).reshape(-1, columns)
    if how.startswith("alternate"):
        joined = torch.stack(tuple(parts), 1).flatten(0, 1)
    else:
        joined = torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]
    return _turned(joined) if how.endswith("_turned") else joined


def _qkvz_parts(value: Tensor, heads: Heads) -> list[Any]:
    values = heads.linear_value // heads.linear_key * heads.head_value
    whole = value.reshape(heads.linear_key, -1, value.shape[-1])
    return list(whole.split((heads.head_key, heads.head_key, values, values), 1))


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(tuple(parts))
