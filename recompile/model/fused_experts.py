"""Parameters of all experts of a layer that a checkpoint stores expert by expert, where transformers' own mapping does
not put them together: the other way around of checkpoint/fused_experts.py."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from recompile.checkpoint.fused_experts import FLAT_LEAVES, FLAT_PARENT, LEAVES, OLD_LEAVES, ROLES
from recompile.errors import CheckpointError

_EXPERT = re.compile(r"(.+)\.(\d+)\.([a-z]\w*)\.(weight|bias)")
_ROLE = {leaf: role for leaves in (LEAVES, OLD_LEAVES) for leaf, role in zip(leaves, ROLES, strict=True)}


class ExpertStack:
    """Puts one parameter together, as a converter of transformers does; add every tensor, then `convert`.

    roles: of its parts along the output axis, "gate" and "up"; alternating: they take turns row by row
    transposed: the parameter is [experts, in, out]; a bias is [experts, out] in any case
    """

    def __init__(self, name: str, roles: tuple[str, ...], transposed: bool, alternating: bool) -> None:
        self.target_patterns = [name]
        self.roles, self.transposed, self.alternating = roles, transposed, alternating
        self._values: dict[str | None, list[Tensor]] = {}

    def add_tensor(self, target: str, source: str, pattern: str | None, value: Tensor) -> None:
        self._values.setdefault(pattern, []).append(value)

    def convert(self, name: str, model: Any = None, config: Any = None) -> dict[str, Tensor]:
        """name -> [experts, out, in], [experts, in, out] or, of biases, [experts, out]."""
        shapes = {tuple(value.shape) for role in self.roles for value in self._values[role]}
        if len(shapes) > 1:
            found = " and ".join(str(list(shape)) for shape in sorted(shapes))
            raise CheckpointError(f"{name}: is made of its experts' parts, which have the shapes {found}, wanted one")
        parts = [torch.stack(self._values[role]) for role in self.roles]
        whole = torch.stack(parts, 2).flatten(1, 2) if self.alternating else torch.cat(parts, 1)
        return {name: whole.transpose(1, 2).contiguous() if self.transposed and whole.dim() == 3 else whole}


class ExpertStacks:
    """The fused experts of a model, and where a tensor of one expert belongs in them."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = {name: module for name, module in model.named_modules() if _is_block(module)}
        self._pairs = {name: pair for name, module in model.named_modules() if (pair := _pair_of_stacks(module))}
        self._by_layer: dict[str, list[str]] = {}
        for name in [*self._blocks, *self._pairs]:
            for number in re.findall(r"(?<=\.)\d+(?=\.)", f"{name}.")[:1]:
                self._by_layer.setdefault(number, []).append(name)
        self._made: dict[str, ExpertStack] = {}

    def place(self, tensor: str, renamed: str) -> tuple[str, str] | None:
        """(parameter, role) of a tensor such as `...experts.7.up_proj.weight`; None where it is no expert's.

        renamed: the tensor's name as transformers' mapping changes it
        """
        found = _EXPERT.fullmatch(renamed)
        role = _ROLE.get(found[3]) if found else None
        if found is None or role is None:
            return None
        name = found[1]
        if name not in self._blocks and name not in self._pairs:
            # the mapping renames the fused tensor, and does not know one expert's
            number = re.search(r"\.(\d+)\.", name)
            near = self._by_layer.get(number[1], []) if number and ".experts" in name else []
            if len(near) != 1:
                return None
            (name,) = near
        if name in self._pairs:
            return self._place_in_pair(name, role) if found[4] == "weight" else None
        block = self._blocks[name]
        leaf = "gate_up_proj" if role != "down" and hasattr(block, "gate_up_proj") else f"{role}_proj"
        if name.endswith(FLAT_PARENT):
            leaf = FLAT_LEAVES[ROLES.index(role)]
        parameter = f"{name}.{leaf}" + ("_bias" if found[4] == "bias" else "")
        if parameter.removeprefix(f"{name}.") not in block._parameters:
            return None
        if parameter not in self._made:
            roles = ("gate", "up") if leaf == "gate_up_proj" else (role,)
            alternating = getattr(block, "is_concatenated", True) is False and len(roles) > 1
            transposed = role == "down" if leaf in FLAT_LEAVES else is_transposed(block)
            self._made[parameter] = ExpertStack(parameter, roles, transposed, alternating)
        return parameter, role

    def _place_in_pair(self, name: str, role: str) -> tuple[str, str]:
        first, second, transposed = self._pairs[name]
        roles = ("down",) if role == "down" else ("gate", "up")
        parameter = f"{name}.{second if role == 'down' else first}.weight"
        self._made.setdefault(parameter, ExpertStack(parameter, roles, transposed, alternating=False))
        return parameter, role

    def converter(self, parameter: str) -> ExpertStack | None:
        return self._made.get(parameter)


def _is_block(module: nn.Module) -> bool:
    stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    named = hasattr(module, "down_proj") or all(leaf in module._parameters for leaf in FLAT_LEAVES)
    return len(stacks) > 1 and len({len(p) for p in stacks}) == 1 and named


def stack_flat_experts(model: nn.Module) -> None:
    """Give experts whose rows lie one below another (DBRX) an axis of their own, in place: [experts x intermediate,
    hidden] becomes [experts, intermediate, hidden], which such a model's forward takes as well."""
    for name, module in model.named_modules():
        count = getattr(module, "moe_num_experts", None)
        if not name.endswith(FLAT_PARENT) or type(count) is not int:
            continue
        for leaf in FLAT_LEAVES:
            flat = module._parameters.get(leaf)
            if flat is not None and flat.dim() == 2 and len(flat) % count == 0:
                made = flat.detach().view(count, -1, flat.shape[1])
                module._parameters[leaf] = nn.Parameter(made, requires_grad=flat.requires_grad)


def is_flat(parameter: str) -> bool:
    """Whether checkpoints store that parameter with the experts' rows one below another."""
    parent, _, leaf = parameter.rpartition(".")
    return parent.endswith(FLAT_PARENT) and leaf in FLAT_LEAVES


def _pair_of_stacks(module: nn.Module) -> tuple[str, str, bool] | None:
    """The children that hold gate and up, and down, of all experts in a weight of their own (JetMoE, Aria), and whether
    those are [experts, in, out]."""
    stacks = {}
    for name, child in module._modules.items():
        weight = child._parameters.get("weight") if child is not None else None
        if weight is not None and weight.dim() == 3:
            stacks[name] = weight.shape
    if len(stacks) != 2:
        return None
    for first, second in (tuple(stacks), tuple(stacks)[::-1]):
        pair, down = stacks[first], stacks[second]
        if pair[0] == down[0] and (pair[2], pair[1]) == (down[1], 2 * down[2]):
            return first, second, False
        if pair[0] == down[0] and (pair[1], pair[2]) == (down[2], 2 * down[1]):
            return first, second, True
    return None


def is_transposed(block: nn.Module) -> bool:
    """Whether fused experts are [experts, in, out]."""
    pair, down = getattr(block, "gate_up_proj", None), getattr(block, "down_proj", None)
    if isinstance(pair, Tensor) and isinstance(down, Tensor):
        return (pair.shape[1], pair.shape[2]) == (down.shape[2], 2 * down.shape[1])
    return bool(getattr(block, "is_transposed", False))
