"""The inputs of every linear map of a layer, as Hessians X^T X, collected while the layer runs.

Nothing here knows architectures: every `torch.nn.functional.linear` call inside the layer is watched, and its weight
tells which checkpoint module it belongs to. Experts that transformers keeps fused in one 3-D parameter are told apart
by which slice of it the call reads, so each expert gets the Hessian of the tokens that the router really sent to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.events import OnEvent, Progress, ignore
from recompile.model.finite import check_finite
from recompile.model.linear_calls import LinearMode
from recompile.model.stream import LayeredModel, LinearWeights

BATCH_TOKENS = 2048
EVERYWHERE = "inputs of all places count, for which of them are of a response cannot be told"
_GATHERS = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)
_SPLITS = (torch.split, torch.Tensor.split, torch.split_with_sizes, torch.Tensor.split_with_sizes)


@dataclass
class InputStatistics:
    """What modules that read the same input share. `modules` are checkpoint names."""

    modules: list[str]
    hessian: Tensor | None = None  # [in, in] float32, sum over tokens of x x^T
    tokens: int = 0
    largest: Tensor | None = None  # [in] float32, largest |x| of every input
    absolute: Tensor | None = None  # [in] float32, sum over tokens of |x|
    note: str = ""  # whose inputs these are, where they are not the modules' own

    def add(self, inputs: Tensor) -> None:
        """Count the inputs of a call, [..., in]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if len(x) == 0:
            return
        self._count(x, x)

    def _count(self, x: Tensor, weighted: Tensor) -> None:
        """Inputs [tokens, in], at least one, and the same times what the tokens count."""
        self.tokens += len(x)
        size = x.abs()
        if self.hessian is None or self.largest is None or self.absolute is None:
            self.hessian, self.largest, self.absolute = weighted.T @ x, size.amax(0), size.sum(0)
        else:
            self.hessian.addmm_(weighted.T, x)
            self.largest = torch.maximum(self.largest, size.amax(0))
            self.absolute += size.sum(0)

    def aimed(self, name: str, weight: Tensor) -> Tensor:
        """The weight [out, in] to round for a module of this input: its own."""
        return weight


class InputPower(InputStatistics):
    """The diagonal alone: `hessian` is [in], the summed squares of every input."""

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if len(x):
            self.tokens += len(x)
            power = x.square().sum(0)
            self.hessian = power if self.hessian is None else self.hessian.add_(power)


@dataclass
class InputsWithPower(InputStatistics):
    """Both: X^T X, and its diagonal as `InputPower` sums it, float32 [in]."""

    power: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Count the inputs of a call, [..., in]."""
        super().add(inputs)
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if len(x):
            power = x.square().sum(0)
            self.power = power if self.power is None else self.power.add_(power)


@dataclass
class InputCollector(LinearMode):
    """Context manager: inside it, linear calls of one loaded layer add to the Hessians of their inputs. Leaving it
    raises NotFiniteError where these are no numbers.

    groups: filled while running; modules that are always given the very same tensor (q, k, v; gate, up) share one entry
    counted: bool [rows, tokens] of the batch that runs, the places whose inputs count; None: all
    """

    groups: list[InputStatistics] = field(default_factory=list)
    statistics: type[InputStatistics] = InputStatistics
    counted: Tensor | None = None

    def __init__(self, model: LayeredModel, index: int) -> None:
        super().__init__(LinearWeights(model, index))
        self.groups, self.counted = [], None
        self._taken: Tensor | None = None  # the places that an expert was given last
        self._parted: Tensor | None = None  # what was split among experts, a row for each of these places
        self._group_of: dict[str, InputStatistics] = {}
        self._label = model.loaded_from
        self._last: tuple[Tensor, InputStatistics] | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self.weights.find(weight)
        if found is not None:
            self._add(found.modules, x)
        return super().linear(x, weight, bias)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.counted is not None and func in _GATHERS:
            of = [value for value in (args[1] if isinstance(args[1], tuple) else args[1:]) if isinstance(value, Tensor)]
            if (
                len(args[0]) == self.counted.numel()
                and len(of) == 1
                and of[0].dtype == torch.int64
                and of[0].dim() == 1
            ):
                self._taken, self._parted = of[0], None
        elif self._taken is not None and func in _SPLITS and len(args[0]) == len(self._taken):
            self._parted = args[0]
        return super().__torch_function__(func, types, args, kwargs)

    def _places_of(self, inputs: Tensor) -> Tensor | None:
        """Which of all places the inputs of an expert are, [tokens]; None where they are all, or it cannot be told."""
        rows = inputs.numel() // inputs.shape[-1]
        if self.counted is None or self._taken is None or rows == self.counted.numel():
            return None
        if rows == len(self._taken):
            return self._taken
        whole = self._parted
        if whole is None or inputs.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        first, rest = divmod(inputs.data_ptr() - whole.data_ptr(), whole.stride(0) * whole.element_size())
        is_part = rest == 0 and 0 <= first <= first + rows <= len(self._taken)
        return self._taken[first : first + rows] if is_part else None

    def _meant(self, group: InputStatistics, inputs: Tensor) -> Tensor:
        """The inputs of a call, [..., in], at the places that count. Experts are given places that were taken out of
        all by their numbers."""
        if self.counted is None:
            return inputs
        flat, marks = inputs.reshape(-1, inputs.shape[-1]), self.counted.to(inputs.device)
        if len(flat) == marks.numel():
            is_turned = inputs.dim() > 2 and inputs.shape[:2] == marks.shape[::-1] != marks.shape
            return flat[(marks.T if is_turned else marks).flatten()]
        places = self._places_of(inputs)
        if places is not None:
            return flat[marks.flatten()[places]]
        group.note = EVERYWHERE
        return inputs

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise NotFiniteError where inputs were NaN or infinite, or their squares are."""
        for group in self.groups:
            if group.hessian is not None:
                check_finite(group.hessian, f"{self._label}: inputs of {group.modules[0]}")

    def _add(self, modules: tuple[str, ...], inputs: Tensor) -> None:
        leader = modules[0]
        group = self._group_of.get(leader)
        if group is None:
            if self._last is not None and self._last[0] is inputs:
                group = self._last[1]
                group.modules += modules
            else:
                group = self.statistics(list(modules))
                self.groups.append(group)
            for module in modules:
                self._group_of[module] = group
        if self._last is not None and self._last[0] is inputs:
            self._last = (inputs, group)
            if group.modules[0] != leader:
                return
        self._last = (inputs, group)
        if group.modules[0] != leader:
            return
        self.accumulate(group, self._meant(group, inputs))

    def accumulate(self, group: InputStatistics, inputs: Tensor) -> None:
        """Count the inputs of a call, [..., in]."""
        group.add(inputs)


@torch.inference_mode()
def input_power(
    base: Checkpoint,
    ids: Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    counted: Tensor | None = None,
    on_event: OnEvent = ignore,
) -> dict[str, Tensor]:
    """Module -> [in] float32, the mean square of every input over calibration rows ids, int64 [rows, tokens], at the
    places that count (bool [rows, tokens]; None: all).

    Streams the model once; an expert's mean is over the tokens that the router sent to it, and one that got none is
    left out.
    """
    found: dict[str, Tensor] = {}
    for inputs in stream_inputs(base, ids, InputPower, device=device, dtype=dtype, counted=counted):
        for group in inputs.groups:
            if group.hessian is not None:
                found |= dict.fromkeys(group.modules, group.hessian / group.tokens)
        assert inputs.layer is not None, "the head, which comes last, is not asked for"
        on_event(Progress("calibrating", inputs.layer + 1, inputs.depth, "layers"))
        if inputs.layer + 1 == inputs.depth:
            break
    return found


@dataclass(frozen=True)
class LayerInputs:
    """What the maps of one of `depth` layers are given, or the head (None): under the embedding's name as well where
    both are tied, for then that is the head."""

    layer: int | None
    depth: int
    groups: list[InputStatistics]


@torch.inference_mode()
def stream_inputs(
    base: Checkpoint,
    ids: Tensor,
    statistics: type[InputStatistics],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    counted: Tensor | None = None,
) -> Iterator[LayerInputs]:
    """One pass of calibration rows, int64 [rows, tokens], over the layers; yields what each is given, the head's last.

    counted: bool [rows, tokens], the places whose inputs count; None: all. Raises NotFiniteError.
    """
    model = LayeredModel.of(base, dtype=dtype, device=device)
    model.model.set_experts_implementation("eager")  # one linear call an expert, which InputCollector sees
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    states = list(model.embed(ids, batch))
    for number in range(model.depth):
        with model.layer(number):
            collector = InputCollector(model, number)
            collector.statistics = statistics
            with collector:
                run_batches(model, number, states, batch, collector, counted)
        yield LayerInputs(number, model.depth, collector.groups)
    head, embedding = model.prefix_of(model.head), model.prefix_of(model.embedding)
    tied = base.config.get("tie_word_embeddings") or f"{head}.weight" not in base.tensors
    group = statistics([head, embedding] if tied else [head])
    with model.norm_loaded() as norm:
        for n, state in enumerate(states):
            x = norm(state)  # a state may be wider than what the head takes
            group.add(x if counted is None else x[counted[n * batch : n * batch + len(state)].to(x.device)])
    if group.hessian is not None:
        check_finite(group.hessian, f"{model.loaded_from}: inputs of the head")
    yield LayerInputs(None, model.depth, [group])


def run_batches(
    model: LayeredModel,
    index: int,
    states: list[Tensor],
    batch: int,
    collector: InputCollector,
    counted: Tensor | None = None,
) -> None:
    """Run a loaded layer over states of `batch` rows each, in place, and tell the collector what counts of each.

    states: [batch, tokens, width] each; counted: bool [rows, tokens], the places that count; None: all
    """
    for n, state in enumerate(states):
        collector.counted = None if counted is None else counted[n * batch : n * batch + len(state)]
        states[n] = model.run_layer(index, state, n * batch)
