"""Experts of a layer that a checkpoint keeps in one 3-D tensor, seen expert by expert. Headers only; no torch.

`mlp.experts.gate_up_proj` [experts, 2 x intermediate, hidden] is seen as `mlp.experts.7.gate_proj.weight`
[intermediate, hidden], `mlp.experts.7.up_proj.weight` and so on, under the names that engines give to experts of
their own. Which tensor is what, and which axis is the output, follows from the shapes: what enters down_proj is half as
wide as what leaves gate_up_proj. Only whether gate and up alternate does not show; in gpt-oss they do.
DBRX keeps the rows of all experts one below another, `experts.mlp.w1` [experts x intermediate, hidden], a stack too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recompile.formats import FLOAT_DTYPES, mlx_config
from recompile.formats.stored import TensorInfo, View

ALTERNATING = frozenset({"gpt_oss"})  # model types whose gate_up_proj has gate and up in turn
ALTERNATING_LEAF = "w13_weight"  # of Inkling, which stores them in turn as well
LEAVES = ("gate_proj", "up_proj", "down_proj")
OLD_LEAVES = ("w1", "w3", "w2")  # the same three where the block is called block_sparse_moe, as in Mixtral
ROLES = ("gate", "up", "down")
FLAT_LEAVES = ("w1", "v1", "w2")  # the same three of DBRX, [experts x intermediate, hidden] each
FLAT_PARENT = ".experts.mlp"


@dataclass(frozen=True)
class _Stack:
    """One stored tensor of all experts."""

    info: TensorInfo
    roles: tuple[str, ...]  # of its parts along the output axis
    transposed: bool
    alternating: bool


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about the text model."""
    for key in ("text_config", "llm_config", "language_config"):
        found = config.get(key)
        if isinstance(found, Mapping):
            return found
    return config


def expert_counts(config: Mapping[str, Any]) -> frozenset[int]:
    """Numbers of experts that a config may mean."""
    text = text_config(config)
    inner = text.get("ffn_config")  # of DBRX
    fields = [*text.items(), *(inner.items() if isinstance(inner, Mapping) else ())]
    return frozenset(v for k, v in fields if "expert" in k and type(v) is int and v > 1)


def _as_stack(info: TensorInfo, config: Mapping[str, Any], counts: frozenset[int]) -> TensorInfo:
    """The tensor as [experts, ...] where it holds the experts' rows one below another, else as it is."""
    parent, _, leaf = info.name.rpartition(".")
    if not parent.endswith(FLAT_PARENT) or leaf not in FLAT_LEAVES or len(info.shape) != 2:
        return info
    inner = text_config(config).get("ffn_config")
    width = inner.get("ffn_hidden_size") if isinstance(inner, Mapping) else None
    if type(width) is not int:
        return info
    experts = info.shape[0] // width if width > 0 else 0
    if experts not in counts or experts * width != info.shape[0]:
        return info
    return replace(info, shape=(experts, width, info.shape[1]))


def split_experts(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, ...]]]:
    """All tensors, fused experts as one tensor an expert and projection; and stored name -> the names it is seen under.

    Tensors that are no stack of experts, by shape and by the config's number of experts, stay as they are.
    """
    counts = expert_counts(config)
    switched = _split_switched(tensors, config, counts)
    stacks: dict[str, dict[str, TensorInfo]] = {}
    for name, stored in tensors.items():
        info = _as_stack(stored, config, counts)
        if (
            name not in switched
            and len(info.shape) == 3
            and info.shape[0] in counts
            and min(info.shape[1:]) > 1
            and info.dtype in FLOAT_DTYPES
        ):
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            stacks.setdefault(parent, {})[leaf] = info
    found: dict[str, dict[str, TensorInfo]] = {}  # stored name -> its parts
    for parent, members in stacks.items():
        whole = parent.removesuffix(".mlp") if parent.endswith(FLAT_PARENT) else parent
        container = whole if whole.rpartition(".")[2] == "experts" else f"{whole}.experts"
        leaves = dict(zip(ROLES, OLD_LEAVES if "block_sparse_moe" in parent else LEAVES, strict=True))
        for leaf, stack in _stacks(members, config).items():
            found[stack.info.name] = dict(_parts(stack, container, leaves, "weight"))
            bias = tensors.get(f"{parent}.{leaf}_bias")
            if bias is not None and len(bias.shape) == 2 and bias.shape[0] == stack.info.shape[0]:
                found[bias.name] = dict(_parts(replace(stack, info=bias), container, leaves, "bias"))
    found |= _split_blocks(tensors, counts) | switched
    made: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        made |= found.get(name, {name: info})
    return made, {name: tuple(parts) for name, parts in found.items()}


def _split_switched(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], counts: frozenset[int]
) -> dict[str, dict[str, TensorInfo]]:
    """MLX's stacks: every part of an expert's map, codes, scales and biases, lies [experts, ...] in one tensor; those
    of heads' lie [heads, ...]."""
    heads = text_config(config).get("num_attention_heads")
    if mlx_config.is_by_head(config) and isinstance(heads, int):
        counts |= {heads}
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        names = mlx_config.experts_of(config, name)
        if names is None or len(info.shape) < 2 or info.shape[0] not in counts:
            continue
        size = info.size_bytes // info.shape[0]
        found[name] = {}
        for expert in range(info.shape[0]):
            own = f"{names[0]}{expert}{names[1]}"
            offset, view = info.offset + expert * size, View(info, expert)
            found[name][own] = replace(info, name=own, shape=info.shape[1:], offset=offset, size_bytes=size, view=view)
    return found


def _split_blocks(tensors: Mapping[str, TensorInfo], counts: frozenset[int]) -> dict[str, dict[str, TensorInfo]]:
    """gpt-oss as OpenAI publishes it: `gate_up_proj_blocks` [experts, out, in / 32, 16] and `gate_up_proj_scales`
    [experts, out, in / 32] are MXFP4 of the experts one after another, the rows of gate and up in turn."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, blocks in tensors.items():
        whole = name.removesuffix("_blocks")
        scales = tensors.get(f"{whole}_scales")
        if whole == name or scales is None or len(blocks.shape) != 4 or blocks.shape[0] not in counts:
            continue
        if scales.shape != blocks.shape[:3]:
            continue
        container, _, leaf = whole.rpartition(".")
        leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf)
        if leaves is None:
            continue
        for info, part in ((blocks, "weight_packed"), (scales, "weight_scale"), (tensors.get(f"{whole}_bias"), "bias")):
            if info is not None:
                found[info.name] = dict(_block_parts(info, container, leaves, part))
    return found


def _block_parts(
    info: TensorInfo, container: str, leaves: tuple[str, ...], part: str
) -> Iterator[tuple[str, TensorInfo]]:
    experts, outputs, *rest = info.shape
    width = (rest[0] * rest[1],) if len(rest) == 2 else tuple(rest)
    size = info.size_bytes // experts
    for expert in range(experts):
        for number, leaf in enumerate(leaves):
            name, shape = f"{container}.{expert}.{leaf}.{part}", (outputs // len(leaves), *width)
            view = View(info, expert, rows=(number, len(leaves)) if len(leaves) > 1 else None)
            offset = info.offset + expert * size
            yield (
                name,
                replace(info, name=name, shape=shape, offset=offset, size_bytes=size // len(leaves), view=view),
            )


def _stacks(members: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, _Stack]:
    """What the 3-D tensors of one block are; none where their shapes do not fit together."""
    alternating = text_config(config).get("model_type") in ALTERNATING
    if len(members) == 2:
        for first, second in (tuple(members), tuple(members)[::-1]):
            pair, down = members[first].shape, members[second].shape
            plain = (pair[2], pair[1]) == (down[1], 2 * down[2])
            if plain or (pair[1], pair[2]) == (down[2], 2 * down[1]):
                return {
                    first: _Stack(members[first], ("gate", "up"), not plain, alternating or first == ALTERNATING_LEAF),
                    second: _Stack(members[second], ("down",), not plain, False),
                }
    text = text_config(config)
    hidden = text.get("hidden_size", text.get("d_model"))
    roles = {
        leaf: role for leaves in (LEAVES, OLD_LEAVES, FLAT_LEAVES) for role, leaf in zip(ROLES, leaves, strict=True)
    }
    if not all(leaf in roles for leaf in members):
        return {}
    found = {}
    for leaf, info in members.items():
        out, into = info.shape[1:] if roles[leaf] == "down" else info.shape[:0:-1]
        found[leaf] = _Stack(info, (roles[leaf],), out != hidden and into == hidden, False)
    return found


def _parts(stack: _Stack, container: str, leaves: Mapping[str, str], part: str) -> Iterator[tuple[str, TensorInfo]]:
    info = stack.info
    count = len(stack.roles)
    outputs = info.shape[-1] if stack.transposed or part == "bias" else info.shape[1]
    share = outputs // count
    slice_bytes = info.size_bytes // info.shape[0]
    for expert in range(info.shape[0]):
        for number, role in enumerate(stack.roles):
            name = f"{container}.{expert}.{leaves[role]}.{part}"
            start, step = (number, count) if stack.alternating else (number * share, 1)
            shape: tuple[int, ...] = (share,)
            if part == "weight":
                shape = (share, info.shape[1] if stack.transposed else info.shape[2])
            offset = info.offset + expert * slice_bytes
            scattered = (stack.transposed and part == "weight") or step > 1
            in_turn = scattered and part == "weight" and not stack.transposed
            view = (
                View(info, expert, rows=(start, step))
                if in_turn
                else View(info, expert, (start, step) if scattered else None)
            )
            if not scattered:
                offset += number * slice_bytes // count
            yield name, replace(info, name=name, shape=shape, offset=offset, size_bytes=slice_bytes // count, view=view)
