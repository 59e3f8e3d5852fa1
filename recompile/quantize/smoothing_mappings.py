"""Where a scale a channel can be moved from a linear map's inputs into what makes them, found by running a layer.

A norm's weight divided by s, and the columns of every map that reads its output multiplied by s, are the same function;
so are the rows of up_proj and the columns of down_proj, and those of v_proj and o_proj head by head. Which maps read
which norm is seen while one row of text runs through the layer, and every fold is tried on that row with powers of two,
which floats carry without rounding: a fold that changes the layer's output is not one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recompile.costs import is_expert, similar_experts
from recompile.errors import NotFiniteError
from recompile.model.linear_calls import LinearMode
from recompile.model.stream import LayeredModel, LinearWeight, LinearWeights

# consumer -> the projection that its input is multiplied with or mixed from, without anything in between that is not
# linear in it
PRODUCERS = {"down_proj": "up_proj", "w2": "w3", "o_proj": "v_proj"}
MATCHED_ROWS = 4  # of a map's input that have to be among a norm's outputs
TOLERANCE = 1e-4  # of the largest output, or four steps of the dtype; a wrong fold changes it by much more


@dataclass(frozen=True)
class Fold:
    """One producer and everything that reads it.

    producer:  a norm's module name, or a linear map's
    consumers: linear maps, quantized or not
    channels:  int64 [in] for every column of the consumers, the producer's channel that it reads
    offset:    what a norm adds to its stored weight before multiplying (Gemma: 1); None: the producer is a linear map
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor
    offset: float | None

    @property
    def from_norm(self) -> bool:
        return self.offset is not None


@dataclass(frozen=True)
class _Call:
    """One linear map as it was run: its part of the weight in place, and some rows of its input."""

    weight: Tensor  # [out, in], a view of the parameter
    bias: Tensor | None  # [out]
    inputs: Tensor  # [rows, in]


class _Watch(LinearMode):
    def __init__(self, model: LayeredModel, index: int) -> None:
        super().__init__(LinearWeights(model, index))
        self.calls: dict[str, _Call] = {}
        self._model = model

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self.weights.find(weight)
        if found is not None:
            self._note(found, weight, bias, x)
        return super().linear(x, weight, bias)

    def _note(self, found: LinearWeight, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        start, count = 0, len(found.modules)
        for number, module in enumerate(found.modules):
            size = shape_in(self._model, module)[0] if count > 1 else len(weight)
            if len(rows):
                part = slice(number, None, count) if found.alternating else slice(start, start + size)
                mine = None if bias is None else bias.detach()[part]
                self.calls.setdefault(module, _Call(weight.detach()[part], mine, rows))
            start += size


def shape_in(model: LayeredModel, module: str) -> tuple[int, int]:
    """[out, in] of a linear map, whichever way a dense checkpoint stores it."""
    shape = model.source.modules[module].shape
    assert shape is not None, module
    return (shape[1], shape[0]) if model.is_turned(module) else (shape[0], shape[1])


@torch.inference_mode()
def find_folds(model: LayeredModel, index: int, hidden: Tensor) -> list[Fold]:
    """The folds of one loaded layer that hold on `hidden`, [1, tokens, hidden]: what enters the layer.

    The layer's weights are changed and put back. Of experts, those that no token of the row reached are taken to be
    built like the others.
    """
    ran = _run(model, index, hidden)
    modules = [name for name in model.modules_of_layer(index) if _is_matrix(model, name)]
    return [*_folds_of_norms(ran, modules), *_folds_of_pairs(ran, modules)]


@dataclass(frozen=True)
class _Ran:
    """A loaded layer that one row of text ran through.

    hidden, expected: [1, tokens, hidden], what entered and what left
    outputs: [tokens, channels], what a norm gave when it first ran
    """

    model: LayeredModel
    index: int
    hidden: Tensor
    expected: Tensor
    norms: Mapping[str, nn.Module]
    outputs: Mapping[str, Tensor]
    calls: Mapping[str, _Call]

    def keeps(self, folds: Sequence[Fold]) -> bool:
        """Whether the layer gives the same with these folds, by random powers of two."""
        generator = torch.Generator().manual_seed(0)
        prefix = self.model.prefix_of_layer(self.index)
        undo: list[tuple[Tensor, Tensor]] = []
        for fold in folds:
            count = int(fold.channels.max()) + 1
            scale = (2.0 ** torch.randint(-2, 3, (count,), generator=generator)).to(self.hidden.device)
            for tensor, factor in _changes(fold, scale, self.norms, prefix, self.calls):
                undo.append((tensor, tensor.clone()))
                tensor.copy_(factor)
        try:
            got = self.model.run_layer(self.index, self.hidden)
            self.model.watch.settle()
        except NotFiniteError:  # by this trial's scale: no fold
            got = torch.full_like(self.expected, torch.inf)
        for tensor, value in reversed(undo):
            tensor.copy_(value)
        worst = float((got - self.expected).abs().max())
        allowed = max(TOLERANCE, 4 * torch.finfo(self.expected.dtype).eps)
        return bool(undo) and worst <= allowed * float(self.expected.abs().max())


def _run(model: LayeredModel, index: int, hidden: Tensor) -> _Ran:
    norms = {name: module for name, module in model.layers[index].named_modules() if _is_norm(module)}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, output.detach().reshape(-1, output.shape[-1]))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in norms.items()]
    try:
        with _Watch(model, index) as watch:
            expected = model.run_layer(index, hidden).clone()
    finally:
        for handle in handles:
            handle.remove()
    return _Ran(model, index, hidden, expected, norms, outputs, watch.calls)


def _folds_of_norms(ran: _Ran, modules: Sequence[str]) -> list[Fold]:
    """Between a norm and the maps that read it."""
    found = []
    for name, output in ran.outputs.items():
        readers = [module for module, call in ran.calls.items() if _reads(call.inputs, output)]
        readers = _with_kin(readers, modules)
        weight = ran.norms[name].weight
        if readers and isinstance(weight, Tensor) and weight.numel() == output.shape[-1]:
            offset = _offset(ran.norms[name], output.shape[-1], weight.device)
            if offset is not None:
                channels = torch.arange(output.shape[-1], device=ran.hidden.device)
                norm = f"{ran.model.prefix_of_layer(ran.index)}.{name}"
                fold = Fold(norm, tuple(readers), channels, offset)
                found += [fold] if ran.keeps([fold]) else []
    return found


def _folds_of_pairs(ran: _Ran, modules: Sequence[str]) -> list[Fold]:
    """Between two maps; those of the experts of a layer are tried together."""
    pairs: dict[str, list[Fold]] = {}
    for consumer in modules:
        parent, _, leaf = consumer.rpartition(".")
        producer = f"{parent}.{PRODUCERS[leaf]}" if leaf in PRODUCERS else ""
        if producer in modules:
            channel = _channels(ran.model, producer, consumer)
            if channel is not None:
                fold = Fold(producer, (consumer,), channel.to(ran.hidden.device), None)
                pairs.setdefault(similar_experts(consumer), []).append(fold)
    found = []
    for folds in pairs.values():
        seen = [fold for fold in folds if all(name in ran.calls for name in (fold.producer, *fold.consumers))]
        if seen and ran.keeps(seen):
            found += folds
    return found


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and "norm" in type(module).__name__.lower()


def _is_matrix(model: LayeredModel, name: str) -> bool:
    shape = model.source.modules[name].shape
    return shape is not None and len(shape) == 2


def _reads(inputs: Tensor, output: Tensor) -> bool:
    """Whether rows of a map's input are rows of a norm's output; experts see some of them."""
    if inputs.shape[-1] != output.shape[-1]:
        return False
    if inputs.shape == output.shape:
        return torch.equal(inputs, output)
    return all(bool((output == row).all(1).any()) for row in inputs[:MATCHED_ROWS])


def _with_kin(readers: Iterable[str], modules: Sequence[str]) -> list[str]:
    """The readers, and the same projections of experts that no token reached."""
    found = set(readers)
    kinds = {similar_experts(name) for name in found if is_expert(name)}
    return [name for name in modules if name in found or similar_experts(name) in kinds]


def _offset(norm: nn.Module, width: int, device: torch.device) -> float | None:
    """What the norm adds to its weight: 0, or 1 as Gemma's does; None for a norm of another kind."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    before = weight.clone()
    row = torch.linspace(1, 2, width, device=device, dtype=weight.dtype)[None]
    outputs = []
    for value in (0.0, 1.0, 2.0):
        weight.fill_(value)
        outputs.append(norm(row).float())
    weight.copy_(before)
    zero, one, two = outputs
    step = one - zero
    if not torch.allclose(two - one, step, rtol=1e-2, atol=1e-3) or float(step.abs().max()) == 0:
        return None
    bias = getattr(norm, "bias", None)
    plain = zero if bias is None else zero - bias.float()
    if float(plain.abs().max()) == 0:
        return 0.0
    return 1.0 if torch.allclose(plain, step, rtol=1e-2, atol=1e-3) else None


def _channels(model: LayeredModel, producer: str, consumer: str) -> Tensor | None:
    """For every column of `consumer` the row of `producer` that it reads; query heads share those of a value head."""
    rows, columns = shape_in(model, producer)[0], shape_in(model, consumer)[1]
    if rows == columns:
        return torch.arange(columns)
    config = model.model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads <= 0 or columns % heads or columns % rows:
        return None
    size, repeats = columns // heads, columns // rows
    column = torch.arange(columns)
    return column // size // repeats * size + column % size


def _changes(
    fold: Fold, scale: Tensor, norms: Mapping[str, nn.Module], prefix: str, calls: Mapping[str, _Call]
) -> Iterable[tuple[Tensor, Tensor]]:
    """(tensor in place, its value with the fold) of everything that ran."""
    if fold.offset is not None:
        norm = norms[fold.producer.removeprefix(f"{prefix}.")]
        weight = norm.weight
        assert isinstance(weight, Tensor)
        yield weight, ((weight.float() + fold.offset) / scale - fold.offset).to(weight.dtype)
        bias = getattr(norm, "bias", None)
        if isinstance(bias, Tensor):
            yield bias, (bias.float() / scale).to(bias.dtype)
    else:
        made = calls[fold.producer]
        yield made.weight, made.weight / scale[:, None]
        if made.bias is not None:
            yield made.bias, made.bias / scale
    for name in fold.consumers:
        if name in calls:
            yield calls[name].weight, calls[name].weight * scale[fold.channels]
