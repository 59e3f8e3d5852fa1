"""One forward and one backward pass, streamed, that see every swap of every group at once.

Forward: layer by layer, keeping what enters every layer. Backward: layer by layer in reverse, each layer recomputed
from its stored input, with several cotangents (samples) carried from the logits down. For a linear map with input x and
adjoint a of its output, what a change dW of its weight does to the sample is

    <G, dW> = sum over tokens of a . (x dW'),        G the weight gradient,

one matrix product a candidate (x dW') and one scalar product a sample, row by row and with no G. A pass without random
samples is asked for sums over rows only: there G is formed, a layer's at a time, with one product for all candidates.
Either way a pass reads the model's weights twice and each candidate's once, whatever the number of groups and rows, and
holds one layer, its candidates and the states.

What the samples mean is the caller's: `eval.profile.sketch` draws labels (a Fisher sketch of the KL),
`eval.mixes.oracle` adds the gradient of the KL itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.layer_sizes import DECODING, LayerSizes
from recompile.checkpoint.checkpoint import WeightSource
from recompile.checkpoint.module_names import role_of
from recompile.costs import ProfileGroup
from recompile.errors import NotFiniteError, RecompileError, UnsupportedError
from recompile.formats.checks import is_finite
from recompile.io.memory import FREE_BYTES_KEPT, format_mib, process_bytes
from recompile.model.finite import WIDER, name_of
from recompile.model.linear_calls import LinearMode
from recompile.model.scratch import scratch_tensor
from recompile.model.skeleton import one_line
from recompile.model.stream import LayeredModel, LinearWeight, LinearWeights, release_free_memory

PASS_TOKENS = 512  # rows of a batch hold about this many tokens
DEVICE_PASS_TOKENS = 4096  # of devices that are no CPU: many small products wait for each other there
SAMPLE_BLOCK = 4  # samples whose adjoints are held together
LOGIT_CHUNK_TOKENS = 256


class Cotangents(Protocol):
    """Where the backward pass starts."""

    @property
    def samples(self) -> int: ...

    @property
    def gradients(self) -> int:
        """How many of the samples, the first ones, are no random draws; `SwapProducts.squares` leaves them out."""
        ...

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[Tensor, Mapping[tuple[str, str], Tensor]]:
        """normed: [rows, tokens, hidden] post-norm states of these rows; the context's head is loaded.

        Returns the cotangents with respect to `normed`, [samples, rows, tokens, hidden], and the products
        [rows, samples] of swaps of the head, by (group, source)."""
        ...


class Observer(Protocol):
    """Called with the adjoints of every call of a map during a pass."""

    def __call__(self, shares: list[tuple[str, slice]], adjoints: Tensor, rows: slice) -> None:
        """shares: the modules of a call, each with its part of the outputs; rows: of the pass.

        adjoints: [samples, (rows, tokens | tokens), out] of the call, not to be kept."""
        ...


@dataclass(frozen=True)
class SwapProducts:
    """What one swap does to every sample.

    products: [rows, samples] float32, sum over tokens of adjoint . change of output; of a layer in a pass without
    random samples [1, samples], summed over rows as well
    squares: [rows] float32, mean over random samples of the sum over tokens and outputs of (adjoint * change)^2; None
    for the head and the embedding, and where there are no random samples
    tokens: [rows] int64, tokens that the group's modules saw (fewer than all only for routed experts); all, where there
    are no random samples
    """

    group: str
    source: str
    products: Tensor
    squares: Tensor | None
    tokens: Tensor


@dataclass(frozen=True)
class LayerForward:
    """A layer of the forward pass is done."""

    layer: int
    depth: int


@dataclass(frozen=True)
class LayerBackward:
    """A layer of the backward pass is done; `layer` None is the head (first) or the embedding (last)."""

    layer: int | None
    depth: int
    swaps: tuple[SwapProducts, ...]


@dataclass(frozen=True)
class PassPlan:
    """What a pass will hold, decided before it starts; bytes unless named otherwise."""

    process: int  # the interpreter and its libraries, and what the allocator keeps
    states: int  # what enters every layer; not in memory when `scratch`
    adjoints: int  # one per sample and row
    working: int  # one layer, the graph of a batch, changes of outputs; or the head and its logits
    deltas: int  # changes of weights that are kept for a layer's batches
    batch_rows: int  # rows that run together
    scratch: bool  # states live in a memory-mapped file
    keep_deltas: bool  # False: a candidate is decoded again for every batch

    @property
    def total(self) -> int:
        return self.process + (0 if self.scratch else self.states) + self.adjoints + self.working + self.deltas

    def describe(self) -> str:
        where = " in a scratch file" if self.scratch else ""
        return (
            f"{format_mib(self.total)} of memory at most: {format_mib(self.states)} of states{where}, "
            f"{format_mib(self.adjoints)} of adjoints, {format_mib(self.working)} for one layer or the head, "
            f"{format_mib(self.deltas)} of candidates; {self.batch_rows} rows a batch"
        )


def plan_pass(
    model: LayeredModel,
    groups: Sequence[ProfileGroup],
    candidates: int,
    rows: int,
    tokens: int,
    samples: int,
    cap_bytes: int | None = None,
    making: int = 0,
    weight_gradients: bool = False,
) -> PassPlan:
    """Decide batch and places. making: bytes that making a candidate on the fly takes (making_bytes); weight_gradients:
    whether the plan has to serve for passes without random samples too.

    Raises RecompileError where not even one row fits below the cap."""
    size, hidden = model.dtype.itemsize, model.hidden_size
    layers = [LayerSizes.of(model, index) for index in range(model.depth)]
    head = model.vocab_size * hidden * size
    process = process_bytes(cap_bytes)
    state = model.state_size(tokens)
    states = (model.depth + 1) * rows * tokens * state * size
    adjoints = samples * rows * tokens * state * size
    chunk = min(LOGIT_CHUNK_TOKENS, tokens)
    # the stored head beside its decoded value, and logits, probabilities and their sums of a chunk
    swapped_head = 2 if any(group.layer is None for group in groups) else 0  # another one, as read and decoded
    with_head = (2 + swapped_head) * head + 5 * chunk * model.vocab_size * 4 + (samples + 4) * tokens * hidden * size
    largest = max(layers, key=lambda sizes: sizes.weights)

    def working(batch: int, keep: bool) -> tuple[int, int]:
        """(working, deltas) of a batch of so many rows."""
        graph = batch * tokens * (6 * hidden + 3 * largest.outputs + largest.attention * tokens) * size
        changes = batch * tokens * largest.outputs * (2 * candidates + 2 * SAMPLE_BLOCK) * size
        decoding = DECODING * largest.parameter * max(size, 4) + making
        layer = largest.weights * size
        needs = [with_head, layer + graph + changes + decoding]
        if weight_gradients:  # of a batch, and their sum; then the sum beside each candidate, and their product
            needs += [3 * layer + graph, 2 * layer + decoding + largest.parameter * size]
        return max(needs), candidates * layer if keep else 0

    per_row = rows if not largest.routed else 1
    batch = max(1, min(per_row, (PASS_TOKENS if model.device.type == "cpu" else DEVICE_PASS_TOKENS) // tokens))
    least: PassPlan | None = None
    for scratch in (False, True):
        for keep in (True, False):
            for count in sorted({batch, max(1, batch // 2), 1}, reverse=True):
                work, deltas = working(count, keep)
                plan = PassPlan(process, states, adjoints, work, deltas, count, scratch, keep)
                if cap_bytes is None or plan.total <= cap_bytes:
                    return plan
                least = plan if least is None or plan.total < least.total else least
    assert least is not None, "at least one plan was tried"
    assert cap_bytes is not None, "without a cap the first plan is taken"
    raise RecompileError(
        f"{{max_memory}} {format_mib(cap_bytes)} is too little: this pass needs {format_mib(least.total)} "
        f"({format_mib(process)} program, {format_mib(adjoints)} adjoints, {format_mib(least.working)} for one layer "
        f"or the head); use fewer or shorter rows, or fewer samples"
    )


# ---- what a layer does -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LinearCall:
    weight: LinearWeight
    inputs: Tensor  # [rows, tokens, in], or [tokens of one row, in] for routed experts
    output: Tensor  # the same with out, in the graph


class _Tape(LinearMode):
    """Inside it, linear calls of one loaded layer are noted."""

    def __init__(self, weights: LinearWeights, wanted: frozenset[str]) -> None:
        super().__init__(weights)
        self.calls: list[_LinearCall] = []
        self._wanted = wanted

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = super().linear(x, weight, bias)
        found = self.weights.find(weight)
        if found is not None and not self._wanted.isdisjoint(found.modules):
            self.calls.append(_LinearCall(found, x.detach(), out))
        return out


class _States:
    """What enters every layer, [layers + 1, rows, tokens, hidden], in memory or in an unlinked scratch file."""

    def __init__(self, shape: tuple[int, ...], model: LayeredModel, scratch: bool, folder: Path | None) -> None:
        if scratch:
            self._values = scratch_tensor(shape, model.dtype, folder)
        else:
            self._values = torch.empty(shape, dtype=model.dtype, device=model.device)

    def put(self, layer: int, rows: slice, value: Tensor) -> None:
        self._values[layer, rows] = value.to(self._values.device)

    def get(self, layer: int, rows: slice, device: torch.device) -> Tensor:
        return self._values[layer, rows].to(device, copy=True)


# ---- the pass --------------------------------------------------------------------------------------------------------


@dataclass
class AdjointPass:
    """One model context, its candidates, and the groups whose swaps are asked about.

    context: the weights that the model runs with; candidates: by label
    origin: the weights that changes are counted from; None: the context's
    observe: is shown the adjoints of every call of the groups' maps, in passes with random samples
    """

    model: LayeredModel
    context: WeightSource
    candidates: Mapping[str, WeightSource]
    groups: Sequence[ProfileGroup]
    plan: PassPlan
    scratch_folder: Path | None = None
    origin: WeightSource | None = None
    observe: Observer | None = None

    def __post_init__(self) -> None:
        self.model.model.set_experts_implementation("eager")  # one linear call an expert, which the tape sees
        self._groups_at = _by_layer(self.model, self.groups)

    def run(self, ids: Tensor, cotangents: Cotangents) -> Iterator[LayerForward | LayerBackward]:
        """ids: int64 [rows, tokens]. Yields a LayerForward per layer, a LayerBackward for the head, one per layer from
        the last to the first, and one for the embedding. Raises NotFiniteError for states, gradients or products that
        are no numbers."""
        with torch.no_grad():
            states = _States(
                (self.model.depth + 1, *ids.shape, self.model.state_size(ids.shape[1])),
                self.model,
                self.plan.scratch,
                self.scratch_folder,
            )
            for index in self._forward(ids, states):
                yield LayerForward(index, self.model.depth)
            adjoints, head = self._head(states, len(ids), cotangents)
            modules = {group.name: group.modules[0] for group in self.groups}
            tied = {(s.group, s.source): s.products for s in head if role_of(modules[s.group]) != "head"}
            yield LayerBackward(None, self.model.depth, tuple(s for s in head if (s.group, s.source) not in tied))
            above: dict[tuple[str, str], SwapProducts] = {}  # of weights that layers further down share
            for index in reversed(range(self.model.depth)):
                if len(adjoints) > cotangents.gradients:
                    found = self._backward(index, states, adjoints, cotangents.gradients)
                else:
                    found = self._gradients(index, states, adjoints)
                self._check(f"layer {index}", adjoints, found)
                found = [_plus(swap, above.pop((swap.group, swap.source), None)) for swap in found]
                used_below = {g.name for lower in range(index) for g in self._groups_at.get(lower, ())}
                above |= {(swap.group, swap.source): swap for swap in found if swap.group in used_below}
                found = [swap for swap in found if swap.group not in used_below]
                yield LayerBackward(index, self.model.depth, tuple(found))
            yield LayerBackward(None, self.model.depth, tuple(self._embedding(ids, states, adjoints, tied)))

    def _batches(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.plan.batch_rows):
            yield slice(start, min(rows, start + self.plan.batch_rows))

    def _forward(self, ids: Tensor, states: _States) -> Iterator[int]:
        for rows, embedded in zip(
            self._batches(len(ids)), self.model.embed(ids, self.plan.batch_rows, self.context), strict=True
        ):
            states.put(0, rows, embedded)
        for index in range(self.model.depth):
            with self.model.layer(index, self.context):
                for rows in self._batches(len(ids)):
                    out = self.model.run_layer(index, states.get(index, rows, self.model.device), rows.start)
                    states.put(index + 1, rows, out)
            yield index

    def _head(self, states: _States, rows: int, cotangents: Cotangents) -> tuple[Tensor, list[SwapProducts]]:
        """The adjoints of what leaves the last layer, [samples, rows, tokens, hidden], and the head's own swaps."""
        model = self.model
        pieces: list[Tensor] = []
        products: dict[tuple[str, str], list[Tensor]] = {}
        tokens = 0
        with model.norm_loaded(self.context) as norm, model.head_loaded(self.context):
            for start in range(rows):
                one = slice(start, start + 1)
                hidden = states.get(model.depth, one, model.device)
                tokens = hidden.shape[1]
                normed = norm(hidden)
                model.watch.see(normed, model.loaded_from, "the final norm", start, model.norm_module)
                found, swaps = cotangents.at_norm(one, normed)
                for swap, value in swaps.items():
                    products.setdefault(swap, []).append(value)
                with torch.enable_grad():
                    hidden.requires_grad_(True)
                    normed = norm(hidden)
                    pieces.append(torch.stack([_vjp(normed, [hidden], cotangent)[0] for cotangent in found]))
        counted = torch.full((rows,), tokens)
        found_head = [
            SwapProducts(group, source, torch.cat(values).float().cpu(), None, counted)
            for (group, source), values in products.items()
        ]
        adjoints = torch.cat(pieces, 1)
        self._check("the head", adjoints, found_head)
        return adjoints, found_head

    def _check(self, place: str, adjoints: Tensor, swaps: Sequence[SwapProducts]) -> None:
        """Raise NotFiniteError for gradients, [samples, rows, tokens, hidden], or products that are no numbers."""
        label = getattr(self.context, "label", "") or "the model"
        for swap in swaps:
            for figures in (swap.products, swap.squares):
                if figures is not None and not is_finite(figures):
                    bad = figures.reshape(len(figures), -1).isfinite().logical_not().any(1)
                    row = int(bad.nonzero()[0]) if len(bad) == adjoints.shape[1] else None
                    found = f"what it changes is NaN or infinite in {name_of(adjoints)}; {WIDER}"
                    raise NotFiniteError(f"{label}: {place}: {swap.group} from {swap.source}", found, row)
        if not is_finite(adjoints):
            bad = adjoints.transpose(0, 1).flatten(1).isfinite().logical_not().any(1)
            found = f"gradients are NaN or infinite in {name_of(adjoints)}; {WIDER}"
            raise NotFiniteError(f"{label}: {place}", found, int(bad.nonzero()[0]))

    def _backward(self, index: int, states: _States, adjoints: Tensor, gradients: int) -> list[SwapProducts]:
        """Products of this layer's swaps; `adjoints` of its output become those of its input, in place."""
        model = self.model
        groups = self._groups_at.get(index, [])
        wanted = frozenset(module for group in groups for module in group.modules)
        samples, rows = adjoints.shape[:2]
        with model.layer(index, self.context):
            weights = LinearWeights(model, index)
            deltas = _Deltas(self, index, groups)
            swaps = _Accumulator(groups, self.candidates, rows, samples, model.device)
            for batch in self._batches(rows):
                hidden = states.get(index, batch, model.device).requires_grad_(True)
                with torch.enable_grad(), _Tape(weights, wanted) as tape:
                    out = model.run_layer(index, hidden, batch.start)
                calls = tape.calls
                if len(hidden) > 1 and not all(_row_by_row(call, hidden) for call in calls):
                    raise UnsupportedError(f"layer {index} runs linear maps on parts of a batch; plan one row a batch")
                changes = deltas.changes(calls, len(hidden))
                squares = [torch.zeros_like(call.output) for call in calls]
                for start in range(0, samples, SAMPLE_BLOCK):
                    block = slice(start, min(samples, start + SAMPLE_BLOCK))
                    outputs = [call.output for call in calls]
                    found = [
                        _vjp(out, [hidden, *outputs], cotangent) for cotangent in adjoints[block, batch].to(out.dtype)
                    ]
                    for number in range(len(calls)):
                        stacked = torch.stack([values[1 + number] for values in found])
                        squares[number] += stacked[max(0, gradients - start) :].square().sum(0)
                        if self.observe is not None:
                            self.observe(deltas.shares(calls[number].weight, stacked.shape[-1]), stacked, batch)
                        swaps.add_products(changes[number], stacked, batch, block)
                    for sample, values in enumerate(found):  # last: an output's adjoint may be the cotangent itself
                        adjoints[start + sample, batch] = values[0]
                for number, call in enumerate(calls):
                    swaps.add_squares(changes[number], squares[number] / max(1, samples - gradients), batch)
                    swaps.count_tokens(call, batch)
                del calls, changes, squares, out, hidden, tape
        return swaps.result()

    def _gradients(self, index: int, states: _States, adjoints: Tensor) -> list[SwapProducts]:
        """As _backward where no sample is random: by the gradients of this layer's weights, summed over rows."""
        model = self.model
        groups = self._groups_at.get(index, [])
        wanted = frozenset(module for group in groups for module in group.modules)
        rows, tokens = adjoints.shape[1:3]
        with model.layer(index, self.context) as layer:
            deltas = _Deltas(self, index, groups)
            parts: dict[str, list[tuple[ProfileGroup, Any]]] = {}  # of every parameter whose it is, and which part
            for weight in LinearWeights(model, index):
                if not wanted.isdisjoint(weight.modules):
                    axis = -1 if weight.transposed else -2
                    outputs = layer.get_parameter(weight.parameter.removeprefix(deltas.prefix)).shape[axis]
                    for module, share in deltas.shares(weight, outputs):
                        features = (slice(None), share) if weight.transposed else (share,)
                        part = features if weight.expert is None else (weight.expert, *features)
                        parts.setdefault(weight.parameter, []).append((deltas.group_of[module], part))
            parameters = [layer.get_parameter(name.removeprefix(deltas.prefix)).requires_grad_(True) for name in parts]
            sums: list[dict[str, Tensor]] = [{} for _ in adjoints]  # of every sample the gradients, by parameter
            for batch in self._batches(rows):
                hidden = states.get(index, batch, model.device).requires_grad_(True)
                with torch.enable_grad():
                    out = model.run_layer(index, hidden, batch.start)
                for sample, cotangent in enumerate(adjoints[:, batch].to(out.dtype)):
                    before, *found = _vjp(out, [hidden, *parameters], cotangent)
                    for name, gradient in zip(parts, found, strict=True):
                        kept = sums[sample].setdefault(name, gradient)
                        if kept is not gradient:
                            kept += gradient
                    adjoints[sample, batch] = before
                del hidden, out
            swaps = [(group.name, label) for group in groups for label in deltas.labels(group)]
            place = {swap: number for number, swap in enumerate(swaps)}
            products = torch.zeros(len(swaps), 1, len(sums), device=model.device)
            for name, label in itertools.product(parts, self.candidates):
                asked = [(group, part) for group, part in parts[name] if label in group.bits]
                if asked:
                    delta = deltas.of(name, label, keep=False)
                    for group, part in asked:
                        along = [(of[name][part] * delta[part]).sum(dtype=torch.float32) for of in sums]
                        products[place[group.name, label], 0] += torch.stack(along)
        seen = {group.name: torch.full((rows,), tokens) for group in groups}
        return [
            SwapProducts(*swap, value, None, seen[swap[0]]) for swap, value in zip(swaps, products.cpu(), strict=True)
        ]

    def _embedding(
        self, ids: Tensor, states: _States, adjoints: Tensor, tied: Mapping[tuple[str, str], Tensor]
    ) -> Iterator[SwapProducts]:
        """tied: what the same swaps do as the head, where the embedding is the head as well."""
        for group in self.groups:
            if group.layer is not None or role_of(group.modules[0]) == "head":
                continue
            if self.origin is None:
                before = [states.get(0, rows, self.model.device) for rows in self._batches(len(ids))]
            else:
                before = list(self.model.embed(ids, self.plan.batch_rows, self.origin))
            for source in group.bits:
                products = torch.zeros(adjoints.shape[1], adjoints.shape[0])
                swapped = self.model.embed(ids, self.plan.batch_rows, self.candidates[source])
                for rows, embedded, own in zip(self._batches(len(ids)), swapped, before, strict=True):
                    change = (embedded - own).float().flatten(1)  # [rows, tokens * hidden]
                    along = adjoints[:, rows].float().flatten(2)  # [samples, rows, tokens * hidden]
                    products[rows] = torch.einsum("srn,rn->rs", along, change).cpu()
                products += tied.get((group.name, source), 0)
                found = SwapProducts(group.name, source, products, None, torch.full((len(ids),), ids.shape[1]))
                self._check("the embedding", adjoints, [found])
                yield found


def _by_layer(model: LayeredModel, groups: Sequence[ProfileGroup]) -> dict[int, list[ProfileGroup]]:
    """The groups of every layer, in their order; one whose weights several layers share is in each of them."""
    layers_of: dict[str, list[int]] = {}
    for index in range(model.depth):
        for module in model.modules_of_layer(index):
            layers_of.setdefault(module, []).append(index)
    found: dict[int, list[ProfileGroup]] = {}
    for group in groups:
        if group.layer is not None:
            for index in sorted({group.layer, *(i for module in group.modules for i in layers_of.get(module, ()))}):
                found.setdefault(index, []).append(group)
    return found


def _plus(swap: SwapProducts, other: SwapProducts | None) -> SwapProducts:
    """What a swap changes in two layers that share the weights: gradients of the same output along one change add."""
    if other is None:
        return swap
    squares = None if swap.squares is None or other.squares is None else swap.squares + other.squares
    tokens = torch.maximum(swap.tokens, other.tokens)
    return replace(swap, products=swap.products + other.products, squares=squares, tokens=tokens)


def _vjp(output: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Cotangents of the inputs; zero for those that the output does not depend on differentiably, as what only chooses
    (an indexer, a router's order). Raises UnsupportedError for a model that has no gradients."""
    able = [x for x in inputs if x.requires_grad] if output.requires_grad else []
    try:
        made = torch.autograd.grad(output, able, cotangent, retain_graph=True, allow_unused=True) if able else ()
    except AssertionError as error:  # of a model's own backward, as Reformer's
        raise UnsupportedError(
            f"the model has no gradients where it does not train ({one_line(error)}); measure swaps with {{mode}} exact"
        ) from error
    found = iter(made)
    given = [next(found) if able and x.requires_grad else None for x in inputs]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)]


@dataclass(frozen=True)
class _Change:
    """How one module's output changes under each candidate, in one call."""

    group: str
    labels: tuple[str, ...]
    rows_out: slice  # of the call's output features
    values: Tensor  # [rows, labels, tokens * out of the module]


class _Deltas:
    """Changes of a layer's weights under every candidate, decoded once a layer, or once a batch to save memory."""

    def __init__(self, owner: AdjointPass, index: int, groups: Sequence[ProfileGroup]) -> None:
        self._owner = owner
        self.group_of = {module: group for group in groups for module in group.modules}
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._freed = 0  # bytes that decoding took and gave back since the allocator was last asked to let go of them
        self._origin: tuple[str, Tensor] | None = None
        self._layer, self.prefix = owner.model.layers[index], f"{owner.model.prefix_of_layer(index)}."

    def changes(self, calls: Sequence[_LinearCall], rows: int) -> list[list[_Change]]:
        """Per call the changes of its modules' outputs; parameters are decoded one by one."""
        made: list[list[_Change]] = [[] for _ in calls]
        by_parameter: dict[str, list[int]] = {}
        for number, call in enumerate(calls):
            by_parameter.setdefault(call.weight.parameter, []).append(number)
        for parameter, numbers in by_parameter.items():
            found: dict[tuple[int, str], tuple[slice, tuple[str, ...], Tensor]] = {}
            for number in numbers:
                inputs = calls[number].inputs
                for module, share in self.shares(calls[number].weight, calls[number].output.shape[-1]):
                    labels = self.labels(self.group_of[module])
                    features = len(range(*share.indices(calls[number].output.shape[-1])))
                    shape = (len(labels), inputs.shape[:-1].numel(), features)
                    found[number, module] = share, labels, inputs.new_empty(shape)
            for label in self._owner.candidates:
                asked = [(number, *entry) for (number, _), entry in found.items() if label in entry[1]]
                if not asked:
                    continue
                delta = self.of(parameter, label)
                for number, share, labels, values in asked:
                    which = calls[number].weight
                    weight = delta if which.expert is None else delta[which.expert]
                    weight = weight.T if which.transposed else weight
                    torch.mm(calls[number].inputs.flatten(0, -2), weight[share].T, out=values[labels.index(label)])
            for (number, module), (share, labels, values) in found.items():
                if labels:
                    per_row = values.reshape(len(labels), rows, -1).transpose(0, 1)
                    made[number].append(_Change(self.group_of[module].name, labels, share, per_row))
        return made

    def labels(self, group: ProfileGroup) -> tuple[str, ...]:
        """The group's candidates that are asked about."""
        return tuple(label for label in self._owner.candidates if label in group.bits)

    def shares(self, weight: LinearWeight, outputs: int) -> list[tuple[str, slice]]:
        """The weight's modules that are in a group, each with its share of the output features."""
        count = len(weight.modules)
        if count == 1:
            shares = [slice(0, outputs)]
        else:
            sizes = [self._rows_of(module) for module in weight.modules]
            if sum(sizes) != outputs:
                raise UnsupportedError(
                    f"{weight.parameter}: its {count} modules have {sum(sizes)} outputs together, the fused "
                    f"weight {outputs}; cannot tell which rows are whose"
                )
            ends = [sum(sizes[: number + 1]) for number in range(count)]
            if weight.alternating:
                shares = [slice(number, None, count) for number in range(count)]
            else:
                shares = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return [
            (module, share) for module, share in zip(weight.modules, shares, strict=True) if module in self.group_of
        ]

    def _rows_of(self, module: str) -> int:
        shape = self._owner.context.modules[module].shape
        if shape is None:
            raise UnsupportedError(f"{module}: has no shape of [out, in]")
        return int(shape[0])

    def of(self, parameter: str, label: str, keep: bool = True) -> Tensor:
        kept = self._kept.get((parameter, label))
        if kept is not None:
            return kept
        delta = self._owner.model.load_parameter(parameter, self._owner.candidates[label]) - self._own(parameter)
        if keep and self._owner.plan.keep_deltas:
            self._kept[(parameter, label)] = delta
        self._freed += DECODING * 4 * delta.numel()
        if self._freed > FREE_BYTES_KEPT:  # asking how much is free takes a millisecond
            self._freed = 0
            release_free_memory(delta.device)
        return delta

    def _own(self, parameter: str) -> Tensor:
        """What its changes are counted from; a parameter of the origin is held until another one is asked for."""
        origin = self._owner.origin
        if origin is None:
            return self._layer.get_parameter(parameter.removeprefix(self.prefix))
        if self._origin is None or self._origin[0] != parameter:
            self._origin = parameter, self._owner.model.load_parameter(parameter, origin)
        return self._origin[1]


def _row_by_row(call: _LinearCall, hidden: Tensor) -> bool:
    """Whether a map runs on what is of the rows of a batch, one after another: on their tokens, or on as many places of
    each. An expert is given some tokens of the batch."""
    inputs = call.inputs
    if inputs.shape[:-1].numel() == hidden.shape[:-1].numel():
        return True
    return call.weight.expert is None and inputs.dim() == 3 and len(inputs) == len(hidden)


class _Accumulator:
    """Sums of products over the modules of a group, on the device until all are there: asking for each would wait."""

    def __init__(
        self,
        groups: Sequence[ProfileGroup],
        candidates: Mapping[str, WeightSource],
        rows: int,
        samples: int,
        device: torch.device,
    ) -> None:
        self._labels = {g.name: tuple(label for label in candidates if label in g.bits) for g in groups}
        self._products = {
            name: torch.zeros(rows, samples, len(labels), device=device) for name, labels in self._labels.items()
        }
        self._squares = {name: torch.zeros(rows, len(labels), device=device) for name, labels in self._labels.items()}
        self._tokens = {g.name: torch.zeros(rows, dtype=torch.int64) for g in groups}
        self._group_of = {module: group.name for group in groups for module in group.modules}

    def add_products(self, changes: Sequence[_Change], adjoints: Tensor, rows: slice, samples: slice) -> None:
        """adjoints: [samples, (rows, tokens | tokens), out] of one call."""
        count = rows.stop - rows.start
        for change in changes:
            along = adjoints[..., change.rows_out].reshape(len(adjoints), count, -1).transpose(0, 1)
            found = torch.bmm(along, change.values.to(along.dtype).transpose(1, 2)).float()  # [rows, s, labels]
            self._products[change.group][rows, samples] += found

    def add_squares(self, changes: Sequence[_Change], squares: Tensor, rows: slice) -> None:
        count = rows.stop - rows.start
        for change in changes:
            along = squares[..., change.rows_out].reshape(count, -1, 1).float()
            self._squares[change.group][rows] += torch.bmm(change.values.float().square(), along)[..., 0]

    def count_tokens(self, call: _LinearCall, rows: slice) -> None:
        count = rows.stop - rows.start
        tokens = call.inputs.shape[:-1].numel() // count
        for group in {self._group_of[module] for module in call.weight.modules if module in self._group_of}:
            self._tokens[group][rows] = self._tokens[group][rows].clamp(min=tokens)

    def result(self) -> list[SwapProducts]:
        found = []
        for group, labels in self._labels.items():
            products, squares = self._products[group].cpu(), self._squares[group].cpu()
            for number, label in enumerate(labels):
                of_one = products[..., number].contiguous(), squares[:, number].contiguous()
                found.append(SwapProducts(group, label, *of_one, self._tokens[group]))
        return found
