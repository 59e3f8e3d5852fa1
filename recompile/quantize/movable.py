"""What may move in a finished build while its codes stay: scales, norms and biases, and how a gradient reaches them.

A weight is a code times its scales, W = code * s (less a zero point that is scaled too), so for any tensor of scales

    d loss / d log s = sum over the weights that the scale multiplies of (d loss / d W) * W

whatever the format, whatever else multiplies them (Hadamard transforms of EXL3 included). A format is one row of
`SCALES`: the part that moves, and the function that adds up (d loss / d W) * W over the weights of each of its numbers.
What is added to every weight of a group (MLX's biases, `ADDED`) gets the sum of d loss / d W. Norms and biases move by
themselves, in steps of their own size. What moves is held in float32 and used as it will be stored: rounded to its
stored dtype. GGUF keeps its scales inside blocks of codes: `movable_gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from recompile.checkpoint.checkpoint import (
    Checkpoint,
    GgufCheckpoint,
    PartedCheckpoint,
    StoredModule,
    TensorInfo,
    split_name,
)
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.errors import UnsupportedError
from recompile.formats import FLOAT_DTYPES
from recompile.formats.scale_grid import ScaleGrid

Reduce = Callable[[Tensor], Tensor]  # [out, in], (d loss / d W) * W -> the gradient of the log of every scale


@dataclass
class Movable:
    """One stored tensor. Its value is start * exp(delta) for scales, start + unit * delta for norms, biases and what is
    added to the weights of a group.

    start, delta: float32, the tensor's shape;  dtype: the stored one; of E4M3 that a file calls U8, E4M3
    reduce: for parts of a weight [out, in]: weight and gradient of it -> d loss / d log of every scale, or d loss / d
            every number that is added; None for norms and biases
    unit: the root mean square of `start`, 1 where that is 0; of what is added, that of the scales beside it
    added: whether it is added to weights, and moves in steps of `unit`
    """

    tensor: str  # the stored tensor that it is, or is a part of
    start: Tensor
    dtype: torch.dtype
    reduce: Callable[[Tensor, Tensor], Tensor] | None
    unit: float = 1.0
    added: bool = False
    delta: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.delta = torch.zeros_like(self.start)

    @property
    def stored(self) -> Tensor:
        """As it will be stored; a number keeps its start where it moved beyond what the dtype holds."""
        scaled = not self.is_vector and not self.added
        moved = self.start * self.delta.exp() if scaled else self.start + self.unit * self.delta
        rounded = moved.to(self.dtype)
        lost = ~rounded.float().isfinite() | ((rounded.float() == 0) & (self.start != 0) & scaled)
        return torch.where(lost, self.start.to(self.dtype).float(), rounded.float()).to(self.dtype)

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm or a bias, and not a part of a quantized weight."""
        return self.reduce is None

    @property
    def as_the_model(self) -> bool:
        """Whether its gradient is made of the weight as the model has it, [in, out] where that is turned."""
        return False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return True

    def in_file(self, info: TensorInfo, stored: Tensor | None = None) -> Tensor:
        """The tensor as `read_tensor` gives it, with what moved. stored: what it was, where only a part of it moves."""
        return self.stored.view(torch.uint8) if info.dtype == "U8" else self.stored

    def gradient(self, weight: Tensor | None, gradient: Tensor) -> Tensor:
        """Of `delta`; weight and gradient of the decoded weight [out, in], or of the vector itself (weight None)."""
        if self.reduce is None:
            return gradient.float() * self.unit
        assert weight is not None, "scales are asked for with their weight"
        found = self.reduce(weight.float(), gradient.float()).reshape(self.start.shape)
        return found * self.unit if self.added else found


class MovedBuild:
    """A weight source: a build whose movable tensors have the values of `movables`. Implements WeightSource."""

    def __init__(self, build: Checkpoint, movables: Mapping[str, Movable]) -> None:
        self.build, self.movables = build, movables
        self.config, self.modules, self.label = build.config, build.modules, build.label
        self._moving: dict[str, list[str]] = {}  # keys of `movables` by tensor
        for key, movable in movables.items():
            self._moving.setdefault(movable.tensor, []).append(key)

    def has(self, tensor: str) -> bool:
        return self.build.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        if isinstance(self.build, PartedCheckpoint) and tensor in self.build.joined:
            return self.build.join(self.build.joined[tensor], lambda part: self.load(part, device=device))
        module = self.modules.get(tensor) or self.modules.get(split_name(tensor)[0])
        if module is None or not module.is_quantized or tensor != module.dense_name:
            if tensor in self._moving:
                return self.build.restore(tensor, self._moved(self.build.tensors[tensor], device))
            return self.build.load(tensor, device=device)
        if not any(info.name in self._moving for info in module.parts.values()):
            return self.build.load(tensor, device=device)
        return self.build.decode(module, {part: self._moved(info, device) for part, info in module.parts.items()})

    def _moved(self, info: TensorInfo, device: str | torch.device) -> Tensor:
        moving = [self.movables[key] for key in self._moving.get(info.name, ())]
        if len(moving) == 1 and moving[0].is_whole:
            return moving[0].in_file(info).to(device)
        stored = read_tensor(info, device)
        for movable in moving:
            stored = movable.in_file(info, stored)
        return stored


# ---- which tensors ---------------------------------------------------------------------------------------------------


def find_movables(build: Checkpoint, device: str | torch.device = "cpu") -> dict[str, Movable]:
    """By name of the tensor, of a part of its blocks after it in GGUF ("...weight:d"): the scales of quantized modules,
    and norms and biases of the layers, the final norm included.

    Raises UnsupportedError for a build with nothing quantized or with a format whose scales cannot move, naming it.
    """
    from recompile.quantize.movable_gguf import find_gguf_movables

    quantized = [module for module in build.modules.values() if module.is_quantized]
    if not quantized:
        raise UnsupportedError(f"{build.label}: nothing in it is quantized, so there is nothing to heal")
    healed = (*SCALES, "gguf")
    unknown = next((module for module in quantized if module.format not in healed), None)
    if unknown is not None:
        raise UnsupportedError(
            f"{build.label}: {unknown.name} is stored as {unknown.format}, whose scales model_heal does not move; it "
            f"heals {', '.join(healed)}"
        )
    stacked = next((module for module in quantized if module.shape is None or len(module.shape) != 2), None)
    if stacked is not None:
        raise UnsupportedError(
            f"{build.label}: {stacked.name} holds all experts of a layer in one tensor; model_heal wants one for each"
        )
    if isinstance(build, GgufCheckpoint):
        return find_gguf_movables(build, device)
    found: dict[str, Movable] = {}

    def add(tensor: str, reduce: Callable[[Tensor, Tensor], Tensor] | None, added: bool = False) -> Movable:
        value = as_floats(read_tensor(build.tensors[tensor], device))  # as it lies in the file
        start = value.float()
        found[tensor] = Movable(tensor, start, value.dtype, reduce, size_of(start), added)
        return found[tensor]

    joined = parts_of_joined(build)
    for module in build.modules.values():
        if module.is_quantized and role_of(module.name) != "embedding" and module.dense_name not in joined:
            for part, reduce in SCALES[module.format](build, module).items():
                add(module.parts[part].name, partial(_of_product, reduce))
            added = ADDED.get(module.format)
            if added is not None and added.part in module.parts:  # w = code * scale + what is added
                grid = added.grid(build, module)
                moving = add(module.parts[added.part].name, partial(_of_gradient, grid), added=True)
                scales = add(module.parts[added.scale].name, partial(_less_added, grid, moving))
                moving.unit = scales.unit
        for part, info in module.parts.items():
            is_vector = len(info.shape) == 1 and info.dtype in FLOAT_DTYPES
            if is_vector and (part == "bias" or (not module.is_quantized and part == "weight")):
                add(info.name, None)
    return found


def parts_of_joined(build: Checkpoint) -> frozenset[str]:
    """The tensors that the model has in one piece and a build in parts: no gradient reaches them by their names."""
    joined = build.joined.values() if isinstance(build, PartedCheckpoint) else ()
    return frozenset(part for whole in joined for parts in whole.parts for part in parts)


def size_of(value: Tensor) -> float:
    """The root mean square of a tensor of any shape, 1 where that is 0."""
    size = float(value.square().mean().sqrt())
    return size if size > 0 else 1.0


def as_floats(scales: Tensor) -> Tensor:
    """Scales, of any shape, that a file calls bytes are E4M3 (MLX's nvfp4)."""
    return scales.view(torch.float8_e4m3fn) if scales.dtype == torch.uint8 else scales


def _shape(module: StoredModule) -> tuple[int, int]:
    assert module.shape is not None, f"{module.name}: a quantized weight has a shape"
    return (module.shape[0], module.shape[1])


def _packed(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    scheme = build.scheme(module)
    if "weight_g_idx" in module.parts:
        index = build.read(module.parts["weight_g_idx"].name)
        if bool((index >= 0).all()):
            return {"weight_scale": lambda product: _scatter(product, index, module.parts["weight_scale"].shape[1])}
    return {"weight_scale": lambda product: over_grid(product, ScaleGrid(1, scheme.group_size))}


def _mlx(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    """Affine scales and biases move together, see ADDED; nvfp4's as those of compressed-tensors. mxfp4 and mxfp8 scales
    are powers of two."""
    return {"scales": _over_sixteen} if build.scheme(module).mode == "nvfp4" else {}


def _of_product(reduce: Reduce, weight: Tensor, gradient: Tensor) -> Tensor:
    return reduce(weight * gradient)


def _of_gradient(grid: ScaleGrid, weight: Tensor, gradient: Tensor) -> Tensor:
    return over_grid(gradient, grid)


def _less_added(grid: ScaleGrid, added: Movable, weight: Tensor, gradient: Tensor) -> Tensor:
    """d loss / d log scale of w = code * scale + added: the sum of gradient * (w - added)."""
    now = added.stored.float().to(gradient.device)
    return over_grid(weight * gradient, grid) - over_grid(gradient, grid) * now


def _scatter(product: Tensor, index: Tensor, groups: int) -> Tensor:
    return product.new_zeros(len(product), groups).index_add_(1, index.to(product.device).long(), product)


def _plain(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    scheme = build.scheme(module)
    part = getattr(scheme, "scale_part", "weight_scale")
    return {part: lambda product: over_grid(product, scheme.grid)}


def _nvfp4(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    """Scales of 16 weights are 8-bit floats of 3 mantissa bits: most keep their code, some reach the next one."""
    return {"weight_scale": _over_sixteen}


def _over_sixteen(product: Tensor) -> Tensor:
    return over_grid(product, ScaleGrid(1, 16))


def _none(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    """MX scales are powers of two: no neighbour is near enough. Norms and biases of such builds move."""
    return {}


def _exl3(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    rows, columns = _shape(module)  # padded
    return {
        "suh": lambda product: pad(product.sum(0), (0, columns - product.shape[1])),
        "svh": lambda product: pad(product.sum(1), (0, rows - product.shape[0])),
    }


def _exl2(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    from recompile.formats import exl2

    parts = {name: build.read(info.name) for name, info in module.parts.items() if name in exl2.PARTS}
    groups = exl2.group_layout(parts)
    of_packed = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([group.rows for group in groups]))
    of_input = of_packed[parts["q_invperm"].long()]  # the packed row of every input channel, hence its group

    def reduce(product: Tensor) -> Tensor:
        columns = product.sum(0)
        return columns.new_zeros(len(groups)).index_add_(0, of_input[: len(columns)].to(columns.device), columns)

    return {"q_scale_max": reduce}


def _transposed(build: Checkpoint, module: StoredModule) -> Mapping[str, Reduce]:
    """GPTQ and AWQ files: scales [groups, out]; GPTQ with activation order says the group of every column."""
    in_features, groups = _shape(module)[1], module.parts["scales"].shape[0]
    if "g_idx" in module.parts:
        index = build.read(module.parts["g_idx"].name).long()
    else:
        size = build.scheme(module).group_size or in_features
        index = torch.arange(in_features) // size
    return {"scales": lambda product: _scatter(product, index, groups).t()}


def over_grid(product: Tensor, grid: ScaleGrid) -> Tensor:
    """Sums over the weights [out, in] of each scale of a grid, [scale rows, scale columns]."""
    out_features, in_features = product.shape
    rows, columns = grid.rows or out_features, grid.columns or in_features
    padded = pad(product, (0, -in_features % columns, 0, -out_features % rows))
    return padded.unflatten(1, (-1, columns)).sum(2).unflatten(0, (-1, rows)).sum(1)


SCALES: Mapping[str, Callable[[Checkpoint, StoredModule], Mapping[str, Reduce]]] = {
    "pack-quantized": _packed,
    "int-quantized": _plain,
    "float-quantized": _plain,
    "fp8-scale-inv": _plain,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _none,
    "mxfp6-pack-quantized": _none,
    "mxfp8-quantized": _none,
    "gptq": _transposed,
    "awq": _transposed,
    "exl2": _exl2,
    "exl3": _exl3,
    "mlx": _mlx,
}


@dataclass(frozen=True)
class Added:
    """A format's part that is added to the weights of a group, beside the scale that its codes are multiplied by."""

    part: str
    scale: str
    grid: Callable[[Checkpoint, StoredModule], ScaleGrid]


ADDED: Mapping[str, Added] = {
    "mlx": Added("biases", "scales", lambda build, module: ScaleGrid(1, build.scheme(module).group_size)),
}
