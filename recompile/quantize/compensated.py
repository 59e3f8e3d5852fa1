"""Rounding that makes good what was rounded before it: every map aims at the base's outputs, not at its own weight.

Let x be what a map is given in the base, and x' what it is given once the maps before it are rounded, on the same
token. Its outputs are to be those of the base, y = W x; what is rounded is a weight Q that sees x'. Over all tokens

    sum |y - Q x'|^2 = tr((Q - W*) H (Q - W*)^T) + what Q does not change
    H = sum x' x'^T,   W* = W + D (H + damp I)^-1,   D = sum (y - W x') x'^T

A fit to few tokens explains noise as well, so W* - W is shrunk by the share that would be explained of pure noise, and
is nothing where there are fewer than TOKENS_EACH tokens for each input.

The encoder, whatever it is, is given W* and H in place of W and the base's inputs. Where a map's output is added to
another tensor as it is (the residual stream), the sum is to be the base's: y takes up what that tensor lacks,
so errors of earlier layers are made good as well. There tokens count by 1 / mean square of the sum, as the norm behind
it makes them alike: a token of huge states would outvote all others.

The idea is known as asymmetric calibration or error propagation (GPTAQ, Li et al. 2025; QEP, Arai and Ichikawa 2025).

The maps of a layer are taken in stages, in the order in which the layer calls them; those before are rounded when a
stage is measured. Two models run beside each other, a batch at a time: memory is that of plain calibration, with two
layers, two sets of states and a second matrix for every Hessian, and a quarter at most of what is free for outputs of
maps that are final, which the layer's next stages ask for again.

Tokens that an expert is given in both runs are compared; others count in H alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.io.memory import available_bytes
from recompile.model.finite import check_finite
from recompile.model.stream import LayeredModel, LinearWeights
from recompile.quantize.calibrate import InputCollector, InputStatistics
from recompile.quantize.known_outputs import KnownOutputs, Room, kind_of

DAMP = 0.01  # of the mean of H's diagonal
TOKENS_EACH = 4  # for each number fitted; fewer are no sample, for tokens of a row are alike
TINY = 1e-12  # a mean square below which a token's sum counts as no larger
SHARE_KEPT = 4  # one in so many of the bytes that are free: outputs of a layer's maps
UNPAIRED = "inputs could not be compared with the base's: rounded to its own weights"
_ATTENTION = functional.scaled_dot_product_attention
_ADDS = (torch.Tensor.add, torch.Tensor.add_, torch.add, torch.Tensor.__radd__)


@dataclass
class ComparedInputs(InputStatistics):
    """What modules that read the same input are given, beside what the base gives them.

    behind:  sum over tokens of (x - x') x'^T, [in, in]
    lacking: module -> sum over tokens of (r - r') x'^T, [out, in], where its output is added to r'
    """

    behind: Explained | None = None
    lacking: dict[str, Explained] = field(default_factory=dict)
    _moved: Tensor | None = None  # [in, in], takes the place of `behind`: W* - W is W times this
    _added: dict[str, Tensor] = field(default_factory=dict)  # [out, in], likewise of `lacking`: and this

    def add_compared(self, x: Tensor, less: Tensor | None, weights: Tensor | None = None) -> None:
        """Count tokens: x' [tokens, in], x - x' where it is known, weights [tokens] of their squares."""
        if len(x) == 0:
            return
        weighted = x if weights is None else x * weights[:, None]
        self._count(x, weighted)
        if less is not None:
            if self.behind is None:
                self.behind = Explained()
            self.behind.add(less, weighted, weights)

    def aimed(self, name: str, weight: Tensor) -> Tensor:
        """W* of a module's weight W, both [out, in] float32; W itself where nothing was compared."""
        if self.behind is not None:
            self._settle()
        if self._moved is None:
            return weight
        moved = weight @ self._moved
        return weight + (moved.add_(self._added[name]) if name in self._added else moved)

    def _settle(self) -> None:
        """Turn the sums into what is asked for, in the same memory: a layer has many experts."""
        assert self.hessian is not None
        assert self.behind is not None
        damped = self.hessian.clone()
        damped.diagonal().add_(DAMP * self.hessian.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            free = float((self.hessian * inverse).sum())  # degrees of freedom of every output
            self._moved = self.behind.fit(inverse, free, self.tokens)
            self._added = {name: what.fit(inverse, free, self.tokens) for name, what in self.lacking.items()}
        self.behind, self.lacking = None, {}


@dataclass
class Explained:
    """Something of every token, y, that inputs may explain: the sums of y x^T and of |y|^2, tokens weighted."""

    product: Tensor = field(default_factory=lambda: torch.zeros(()))
    power: float = 0.0

    def add(self, y: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """y [tokens, ...] float32, x [tokens, in] times their weights [tokens]."""
        found = y.T @ x
        self.product = self.product.add_(found) if self.product.dim() else found
        squares = y.square().sum(1)
        self.power += float((squares if weights is None else squares * weights).sum())

    def fit(self, inverse: Tensor, free: float, tokens: int) -> Tensor:
        """The map from x to y, [..., in], no more of it than holds on other tokens. inverse: of sum x x^T, damped."""
        found = self.product @ inverse
        return found.mul_(self.share(float((found * self.product).sum()), free, tokens))

    def share(self, explained: float, free: float, tokens: int) -> float:
        """How much of a fit to keep, 0 to 1: what it explains here less what as free a fit explains of noise, as a
        share of the former (James and Stein). explained: of `power`; free: numbers fitted for each output."""
        if explained <= 0 or tokens < TOKENS_EACH * free:
            return 0.0
        noise = free * max(0.0, self.power - explained) / (tokens - free)
        return max(0.0, 1 - noise / explained)


@dataclass(frozen=True)
class _Call:
    """What a map was given in the base: x [tokens, in], and for an expert which tokens [tokens].

    is_known: whether it can be told which tokens these are
    """

    x: Tensor
    places: Tensor | None
    is_known: bool


class _Enough(Exception):
    """All maps of the stage were seen: the rest of the layer does not matter."""


class _StageInputs(InputCollector):
    """The inputs of the maps of one stage in one run of a batch, and what their outputs are added to.

    members: kinds of modules, see `kind_of`;  wanted: what is to be seen before the run may end, None where that cannot
    be told;  adding: the kinds among `members` whose outputs are added to a tensor as they are;  known: outputs that
    need not be made again
    """

    statistics = ComparedInputs

    def __init__(
        self,
        model: LayeredModel,
        index: int,
        members: frozenset[str],
        wanted: frozenset[str] | None,
        adding: set[str],
        known: KnownOutputs | None = None,
    ) -> None:
        super().__init__(model, index)
        self.members, self.wanted, self.adding, self.known = members, wanted, adding, known
        self.places: Tensor | None = None  # of the tokens of a call, where they are some of all
        self.is_known = True  # which tokens those of a call are
        self._outputs: list[tuple[str, Tensor]] = []
        self._seen: set[str] = set()

    def begin(self, counted: Tensor) -> None:
        """Before a batch, or after the last. counted: bool [rows, tokens]."""
        self.counted, self._taken, self._parted, self._last = counted, None, None, None
        self._outputs, self._seen = [], set()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self.weights.find(weight)
        if found is None:
            return super().linear(x, weight, bias)
        self._add(found.modules, x)
        out = self.output(found.modules, x, weight, bias)
        if kind_of(found.modules[0]) not in self.members:
            return out
        if len(found.modules) == 1:
            self._outputs.append((found.modules[0], out))
        if kind_of(found.modules[0]) not in self.adding:
            self._see(found.modules[0])
        return out

    def output(self, modules: tuple[str, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of the map that holds these modules, [..., out]."""
        make = partial(functional.linear, x, weight, bias)
        return make() if self.known is None else self.known.of(modules, x, make)

    def _see(self, module: str) -> None:
        self._seen.add(kind_of(module))
        if self.wanted is not None and self._seen >= self.wanted:
            raise _Enough

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _ATTENTION and args and self.known is not None:
            return self.known.of_all(func.__name__, args[0], lambda: func(*args, **(kwargs or {})))
        added = None
        if func in _ADDS and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            added = self._find_added(*args)
        out = super().__torch_function__(func, types, args, kwargs)
        if added is not None:
            self._see(added)
        return out

    def _find_added(self, one: Tensor, two: Tensor) -> str | None:
        """The module whose output is one of two tensors of the same shape that are about to be added."""
        assert self.counted is not None, "given with every batch"
        if one.shape != two.shape or one.numel() != self.counted.numel() * one.shape[-1]:
            return None
        found = None
        for module, out in self._outputs:
            for mine, other in ((one, two), (two, one)):
                if mine.data_ptr() == out.data_ptr() and mine.numel() == out.numel():
                    found = module
                    self.add_to(module, other, mine)
        self._outputs = [(module, out) for module, out in self._outputs if module != found]
        return found

    def add_to(self, module: str, other: Tensor, out: Tensor) -> None:
        """The module's output is about to be added to `other`, both [rows, tokens, out]."""

    def _add(self, modules: tuple[str, ...], inputs: Tensor) -> None:
        if kind_of(modules[0]) in self.members:
            super()._add(modules, inputs)

    def _meant(self, group: InputStatistics, inputs: Tensor) -> Tensor:
        found = super()._meant(group, inputs)
        assert self.counted is not None, "given with every batch"
        rows, places = inputs.numel() // inputs.shape[-1], self._places_of(inputs)
        is_expert = kind_of(group.modules[0]) != group.modules[0] and rows not in (0, self.counted.numel())
        self.is_known = places is not None or not is_expert
        self.places = None if places is None else places[self.counted.flatten()[places]]
        return found

    def of_counted(self, value: Tensor) -> Tensor:
        """[rows, tokens, width] -> [counted tokens, width] float32."""
        assert self.counted is not None
        is_turned = value.dim() > 2 and value.shape[:2] == self.counted.shape[::-1] != self.counted.shape
        marks = self.counted.T if is_turned else self.counted
        return value.reshape(-1, value.shape[-1])[marks.flatten()].float()


class _Order(_StageInputs):
    """Which kinds of modules a layer calls, in order, those that share an input together, and which of them are added
    as they are. muted: a kind whose outputs are nothing in this run"""

    def __init__(self, model: LayeredModel, index: int, muted: str = "") -> None:
        super().__init__(model, index, frozenset(), None, set())
        self.muted = muted
        self.added_to: dict[str, Tensor] = {}  # what the outputs of a kind are added to, the last of them
        self.stages: list[list[str]] = []
        self.often: set[str] = set()  # kinds of a module that is called more than once
        self._called: set[str] = set()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = super().linear(x, weight, bias)
        found = self.weights.find(weight)
        if found is not None and len(found.modules) == 1:
            if kind_of(found.modules[0]) == self.muted:
                out = out.zero_()
            self._outputs.append((found.modules[0], out))
        return out

    def add_to(self, module: str, other: Tensor, out: Tensor) -> None:
        self.adding.add(kind_of(module))
        self.added_to[kind_of(module)] = other.clone()

    def _add(self, modules: tuple[str, ...], inputs: Tensor) -> None:
        if modules[0] in self._called:
            self.often.update(map(kind_of, modules))
        self._called.add(modules[0])
        kinds = list(dict.fromkeys(map(kind_of, modules)))
        known = [kind for stage in self.stages for kind in stage]
        new = [kind for kind in kinds if kind not in known]
        if self._last is not None and self._last[0] is inputs and new:
            self.stages[-1] += new
        elif new:
            self.stages.append(new)
        self._last = (inputs, InputStatistics([]))


class _BaseInputs(_StageInputs):
    """What the base gives the maps of a stage, kept until the other run of the batch takes it."""

    def begin(self, counted: Tensor) -> None:
        super().begin(counted)
        self.calls: dict[str, list[_Call]] = {}
        self.added: dict[str, list[tuple[Tensor, Tensor]]] = {}  # what outputs are added to, weights of tokens

    def accumulate(self, group: InputStatistics, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        self.calls.setdefault(group.modules[0], []).append(_Call(x, self.places, self.is_known))

    def add_to(self, module: str, other: Tensor, out: Tensor) -> None:
        added = self.of_counted(other)
        power = (added + self.of_counted(out)).square().mean(1)
        self.added.setdefault(module, []).append((added, 1 / power.clamp_(min=TINY)))


class _BothInputs(_StageInputs):
    """The inputs that the rounded part of the model gives, compared with the base's."""

    def __init__(self, base: _BaseInputs, *about: Any) -> None:
        super().__init__(*about)
        self.base = base
        self._held: dict[str, tuple[Tensor, Tensor | None]] = {}  # x' and x - x' until the output is added

    def begin(self, counted: Tensor) -> None:
        for module in list(self._held):  # whose output was not added to anything this time
            self._take(module)
        super().begin(counted)

    def output(self, modules: tuple[str, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.wanted is not None and self.wanted.issuperset(map(kind_of, modules)):
            if self.known is not None:
                self.known.pass_over(modules)
            return x.new_zeros(*x.shape[:-1], len(weight))  # is not rounded yet, and nothing behind it matters here
        return super().output(modules, x, weight, bias)

    def accumulate(self, group: InputStatistics, inputs: Tensor) -> None:
        assert isinstance(group, ComparedInputs)
        module = group.modules[0]
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        calls = self.base.calls.get(module)
        less = _difference(calls.pop(0) if calls else None, _Call(x, self.places, self.is_known))
        if less is None:
            group.note = group.note or UNPAIRED
        self._held[module] = (x, less)
        if kind_of(module) not in self.adding:
            self._take(module)

    def _take(self, module: str, weights: Tensor | None = None) -> None:
        group = self._group_of[module]
        assert isinstance(group, ComparedInputs)
        group.add_compared(*self._held.pop(module), weights)

    def add_to(self, module: str, other: Tensor, out: Tensor) -> None:
        wanted = self.base.added.get(module)
        if module not in self._held or not wanted:
            return
        x, here = self._held[module][0], self.of_counted(other)
        there, weights = wanted.pop(0)
        if there.shape != here.shape or len(x) != len(here):
            return
        self._take(module, weights)
        group = self._group_of[module]
        assert isinstance(group, ComparedInputs)
        group.lacking.setdefault(module, Explained()).add(there - here, x * weights[:, None], weights)


def _difference(base: _Call | None, now: _Call) -> Tensor | None:
    """x - x' of the tokens of a call, [tokens, in] float32; zeros for tokens that the base sends elsewhere; None where
    it cannot be told which tokens are the same."""
    if not now.is_known or (base is not None and not base.is_known):
        return None
    if (base is None or base.places is None) and now.places is None:
        return base.x.float() - now.x if base is not None and base.x.shape == now.x.shape else None
    if now.places is None:
        return None
    if base is None or base.places is None:  # an expert that the base sends nothing
        return torch.zeros_like(now.x) if base is None else None
    less = torch.zeros_like(now.x)
    mine = torch.isin(now.places, base.places).nonzero().flatten()
    in_order, order = base.places.sort()
    less[mine] = base.x[order[torch.searchsorted(in_order, now.places[mine])]].float() - now.x[mine]
    return less


class RoundedLayer:
    """A weight source: the base with some tensors as they were rounded, by name and in the base's shape."""

    def __init__(self, base: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        self._base, self.tensors = base, tensors
        self.config, self.modules = base.config, base.modules

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors or self._base.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        found = self.tensors.get(tensor)
        return self._base.load(tensor, device=device) if found is None else found.to(device)


class ComparedPass:
    """The base's states beside those of a model whose first layers are rounded; `groups` measures a layer."""

    def __init__(
        self, base: Checkpoint, model: LayeredModel, ids: Tensor, batch: int, counted: Tensor | None = None
    ) -> None:
        """ids: int64 [rows, tokens]; batch: rows that run at a time; counted: bool [rows, tokens], the places whose
        inputs count; None: all."""
        self.model, self.batch, self.counted = model, batch, counted
        self.teacher = LayeredModel.of(base, dtype=model.dtype, device=model.device)
        self.teacher.model.set_experts_implementation("eager")
        self.wanted = list(self.teacher.embed(ids, batch))
        room = Room(available_bytes(str(model.device)) // SHARE_KEPT)
        self._of_base, self._of_model = KnownOutputs(room), KnownOutputs(room)
        self._entered = -1  # the layer whose outputs are known
        self._stages: int | None = None  # of it, where those of the rounded one are known too

    def groups(
        self, index: int, states: Sequence[Tensor], source: Callable[[], RoundedLayer]
    ) -> Iterator[ComparedInputs]:
        """What the modules of a layer that share an input are given, a stage after another.

        states: [rows, tokens, width] each, before the layer;  source: the base with what is rounded so far, asked for
        at the start of every stage. Raises NotFiniteError.
        """
        with self.teacher.layer(index):
            stages, adding = self._order(index)
            self._enter(index, stages)
            for place, (stage, is_once) in enumerate(stages):
                members = frozenset(stage)
                is_sure = is_once and not any(".experts.*." in kind for kind in stage)
                wanted = members if is_sure else None
                rounded = source()
                with self.model.layer(index, rounded):
                    self._settle(place, rounded)
                    of_base = _BaseInputs(self.teacher, index, members, wanted, adding, self._of_base)
                    both = _BothInputs(of_base, self.model, index, members, wanted, adding, self._of_model)
                    for number, state in enumerate(states):
                        counted = self._counted(number, state)
                        self._run(self.teacher, index, self.wanted[number], number, of_base, counted)
                        self._run(self.model, index, state, number, both, counted)
                both.begin(counted)
                both.check()
                for group in both.groups:
                    assert isinstance(group, ComparedInputs)
                    if self.counted is None and group.note != UNPAIRED:
                        group.note = ""  # all places count
                    yield group

    def _enter(self, index: int, stages: Sequence[tuple[Sequence[str], bool]]) -> None:
        """A layer is about to be rounded, a stage after another."""
        self._entered = index
        order = {kind: place for place, (stage, _) in enumerate(stages) for kind in stage}
        self._stages = len(stages) if all(is_once for _, is_once in stages) else None
        for known in (self._of_base, self._of_model):
            known.enter(order)
        self._of_base.settle(len(stages))

    def _settle(self, stage: int, rounded: RoundedLayer) -> None:
        """Stages before this one are rounded."""
        if self._stages is not None:
            self._of_model.settle(stage, rounded.tensors)

    def advance(self, index: int, states: list[Tensor], rounded: RoundedLayer) -> None:
        """Run both through a layer that is rounded, in place. states: [rows, tokens, width] each."""
        if self._entered != index:  # nothing of it was rounded
            self._enter(index, [])
        self._settle(self._stages or 0, rounded)
        for model, known, found in (
            (self.teacher, self._of_base, self.wanted),
            (self.model, self._of_model, states),
        ):
            with model.layer(index, None if model is self.teacher else rounded):
                inputs = _StageInputs(model, index, frozenset(), None, set(), known)  # of no stage
                for number, state in enumerate(found):
                    inputs.begin(self._counted(number, state))
                    known.begin(number)
                    with inputs:
                        found[number] = model.run_layer(index, state, number * self.batch)

    def of_head(self, states: Sequence[Tensor], module: str, note: str = "") -> ComparedInputs:
        """What the head is given, which goes by a module's name. states: [rows, tokens, width] each, before
        the last norm."""
        group = ComparedInputs([module], note=note)
        with self.teacher.norm_loaded() as of_base, self.model.norm_loaded() as of_model:
            for number, state in enumerate(states):
                marks = self._counted(number, state).flatten()
                x, wanted = (
                    value.reshape(-1, value.shape[-1])[marks.to(value.device)].float()
                    for value in (of_model(state), of_base(self.wanted[number]))
                )
                group.add_compared(x, wanted - x)
        if group.hessian is not None:
            check_finite(group.hessian, f"{self.model.loaded_from}: inputs of {module}")
        return group

    def _counted(self, number: int, state: Tensor) -> Tensor:
        if self.counted is None:
            return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        return self.counted[number * self.batch : number * self.batch + len(state)].to(state.device)

    def _order(self, index: int) -> tuple[list[tuple[list[str], bool]], set[str]]:
        """The loaded layer's stages, from one row of the base, and whether that row called each module once; the kinds
        whose outputs are added to a tensor as they are."""
        order, weights = self._probe(index), LinearWeights(self.teacher, index)
        known = {kind for stage in order.stages for kind in stage}
        rest = dict.fromkeys(kind for weight in weights for kind in map(kind_of, weight.modules) if kind not in known)
        stages = [(stage, order.often.isdisjoint(stage)) for stage in order.stages]
        stages += [(list(rest), False)] if rest else []
        adding = {kind for kind in order.adding if ".experts.*." not in kind}
        return stages, {kind for kind in adding if self._is_apart(index, kind, order.added_to[kind])}

    def _is_apart(self, index: int, kind: str, added_to: Tensor) -> bool:
        """Whether what a map's output is added to is not made of that output itself, as in x + x^3 of a GELU."""
        found = self._probe(index, muted=kind).added_to.get(kind)
        return found is not None and torch.equal(found, added_to)

    def _probe(self, index: int, muted: str = "") -> _Order:
        row = self.wanted[0][:1].clone()
        order = _Order(self.teacher, index, muted)
        order.begin(torch.ones(row.shape[:2], dtype=torch.bool, device=row.device))
        with order:
            self.teacher.run_layer(index, row)
        return order

    def _run(
        self, model: LayeredModel, index: int, state: Tensor, number: int, inputs: _StageInputs, counted: Tensor
    ) -> None:
        inputs.begin(counted)
        if inputs.known is not None:
            inputs.known.begin(number)
        with suppress(_Enough), inputs:
            model.run_layer(index, state, number * self.batch)
