"""What a model's own forward does around its layers, found by running it once on weights of zero.

One run of a few tokens tells which module holds the layers, what every layer is called with and returns, and which
weights are read before, after and beside them. Values are not looked at: every tensor is followed from where it comes
(token ids, a layer's output, neither), so that what differs from row to row is known from what is the same for all.

What a layer reads of earlier ones is the state of a row: the hidden state, and for some architectures more (per-layer
inputs, keys and values shared between layers, positions chosen by an indexer). A state is one tensor [rows, tokens,
width]: the hidden state in the first columns, the rest behind it.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recompile.errors import UnsupportedError

PROBE_ROWS, PROBE_TOKENS = 2, 5
# What a model's own code raises on a config or inputs that it does not fit.
OF_MODELS = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError)

MAP_NORESERVE = 0x4000  # of Linux's <asm-generic/mman.h>: nothing is promised, so more than there is may be asked for

Path = tuple[Any, ...]


# ---- trees of arguments ----------------------------------------------------------------------------------------------


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested tuples, lists and mappings, with the way to it."""
    if isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from walk(item, (*path, number))
    elif isinstance(value, MutableMapping):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    else:
        yield path, value


def at(value: Any, path: Path) -> Any:
    """The leaf at the end of a path."""
    for step in path:
        value = value[step]
    return value


def rebuild(value: Any, leaf: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same tree with every leaf made anew; mappings and lists are fresh ones."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(item, leaf, (*path, n)) for n, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(item, leaf, (*path, number)) for number, item in enumerate(value))
    if isinstance(value, MutableMapping):
        fresh = {key: rebuild(item, leaf, (*path, key)) for key, item in value.items()}
        return fresh if type(value) is dict else type(value)(fresh)  # type: ignore[call-arg]
    return leaf(path, value)


def is_cache(value: Any) -> bool:
    """Whether an argument is one of transformers' caches of keys and values."""
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


# ---- following tensors -----------------------------------------------------------------------------------------------

_SHAPE_ONLY = (
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
)  # fmt: skip


def storage_of(tensor: Tensor) -> int:
    """The same for all views of one storage; tensor: any shape."""
    return tensor.untyped_storage()._cdata


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors, of any shape, with the same identity are one value; valid while both are alive."""
    return storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class Came:
    """A label: follows from what a layer returned at a path, or from the token ids, before any layer (-1)."""

    layer: int
    path: Path


class Follow(TorchDispatchMode):
    """Notes what every tensor, of any shape, follows from, "ids" or "layer", and which weights are read."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.labels: dict[int, frozenset[Any]] = {}
        self.paused = False
        self._read: set[str] = set()
        self._weights = weights
        self._alive: list[Any] = []

    def mark(self, tensor: Tensor, label: Any) -> None:
        self._alive.append(tensor)
        self.labels[storage_of(tensor)] = self.labels.get(storage_of(tensor), frozenset()) | {label}

    def take(self) -> set[str]:
        """Names of the weights read since it was last asked."""
        found, self._read = self._read, set()
        return found

    def leaves_layer(self, tensor: Tensor, index: int, path: Path) -> None:
        """From here on, what follows from it is said to follow from this layer's result, not from what is before."""
        kept = {label for label in self.of(tensor) if not isinstance(label, Came)}
        self.labels[storage_of(tensor)] = frozenset(kept)
        self.mark(tensor, Came(index, path))

    def of(self, tensor: Tensor) -> frozenset[Any]:
        return self.labels.get(storage_of(tensor), frozenset())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        labels: frozenset[Any] = frozenset()
        for leaf in inputs:
            key = storage_of(leaf)
            if key in self._weights:
                self._read.add(self._weights[key])
            labels |= self.labels.get(key, frozenset())
        if labels and func.overloadpacket.__name__ not in _SHAPE_ONLY:
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if func._schema.is_mutable:
                made += inputs[:1]
            for leaf in made:
                for label in labels:
                    self.mark(leaf, label)
        return out


# ---- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Was:
    """Stands for a tensor of the run on zeros, of any shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Was:
        return Was(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class LayerPort:
    """How the state enters and leaves one layer.

    inputs: the tree of (args, kwargs), every leaf None
    hidden: where in (args, kwargs) the hidden state is
    reads: where tensors of earlier layers are, and which extra of the state each is
    result: the value returned, with a Was in place of every tensor
    out: where in (result, args, kwargs) after the call the hidden state is
    gives: extras of the state that the layer makes, and where they are then
    """

    inputs: Any
    hidden: Path
    reads: Mapping[Path, int]
    result: Any
    out: Path
    gives: Mapping[int, Path]


@dataclass(frozen=True)
class Structure:
    """A model's own forward, by names of its modules and weights; holds no tensor.

    before, after, head: weights read before the first layer, between the last one and the head's part, and there
    base: the module whose result the head's part takes
    norm: the module that makes it of the hidden state, "" where they are the same, None where it takes more than one
    ran: numbers of the layers that run on text, in order; those that read images alone do not
    ports: of every one of them
    extras: how many tensors beside the hidden state layers hand to later ones
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    head: tuple[str, ...]
    base: str
    norm: str | None
    ran: tuple[int, ...]
    ports: tuple[LayerPort, ...]
    hidden_shape: tuple[int, ...]  # of PROBE_ROWS rows of PROBE_TOKENS tokens
    extras: int


class Reached(Exception):
    """The forward has come as far as it was wanted."""


@contextmanager
def patched(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, the modules run these functions."""
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def run_own(runner: Any, ids: Tensor) -> Any:
    """The model's own forward on token rows, int64 [rows, tokens], without a cache."""
    return runner(input_ids=ids, use_cache=False)


# ---- the run on zeros ------------------------------------------------------------------------------------------------


@dataclass
class _Calls:
    """How the layers were called, in the order in which they ran.

    results: (result, args, kwargs) after a call; inputs: the tree of its (args, kwargs), every leaf None
    entered: the leaves of (args, kwargs) before it; left: those of `results`; mappings are filled by later calls
    ran: numbers of the layers; before: weights read up to the last of them
    """

    results: list[tuple[Any, Any, Any]] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    entered: list[list[tuple[Path, Any]]] = field(default_factory=list)
    left: list[list[tuple[Path, Any]]] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    before: set[str] = field(default_factory=set)


@dataclass
class Probe:
    """Runs a model's own forward on weights of zero. The model's weights must all be on the meta device."""

    model: nn.Module
    runner: nn.Module
    layers: Sequence[nn.Module]
    stack_name: str  # of the list of layers in the model
    device: torch.device
    what: str  # the class, for messages

    def run(self) -> Structure:
        """Raises UnsupportedError, in one sentence, for a model that is not one sequence of layers."""
        with ExitStack() as stack, torch.no_grad():
            weights = stack.enter_context(zeros_outside(self.model, self.stack_name, self.device))
            return self._run(weights)

    def _run(self, weights: Mapping[int, str]) -> Structure:
        follow, calls = Follow(weights), _Calls()
        phases: list[set[str]] = []  # weights read up to every end of a base
        ids = torch.arange(PROBE_ROWS * PROBE_TOKENS, device=self.device).reshape(PROBE_ROWS, PROBE_TOKENS)
        follow.mark(ids, "ids")
        follow.mark(ids, Came(-1, ()))
        events: list[tuple[str, Tensor, Any]] = []  # module, first argument, result
        bases: list[tuple[str, Any]] = []
        with ExitStack() as stack:
            forwards = [self._forward_of(n, layer, calls, follow) for n, layer in enumerate(self.layers)]
            stack.enter_context(patched(self.layers, forwards))
            self._watch(stack, events, bases, phases, follow)
            with follow:
                run_own(self.runner, ids)
        if not calls.ran:
            raise UnsupportedError(f"{self.what} runs none of the layers of {self.stack_name}; not supported")
        if not bases:
            raise UnsupportedError(f"{self.what} has no base model under its head; not supported")
        found = _Ports(self.what, calls, follow)
        ports = found.of_all()
        base, result = bases[-1]  # the outermost one ends last
        sources = {label for label in follow.of(result_of(result)) if isinstance(label, Came)}
        if sources - {Came(len(calls.ran) - 1, ports[-1].out)}:
            raise UnsupportedError(
                f"{self.what}: what its head takes follows from more than what leaves the last layer; not supported"
            )
        return Structure(
            before=tuple(sorted(calls.before)),
            after=tuple(sorted(set().union(*phases))),
            head=tuple(sorted(follow.take())),
            base=base,
            norm=_norm_of(events, at(calls.results[-1], ports[-1].out), result),
            ran=tuple(calls.ran),
            ports=tuple(ports),
            hidden_shape=tuple(found.hidden.shape),
            extras=found.extras,
        )

    def _forward_of(self, index: int, layer: nn.Module, calls: _Calls, follow: Follow) -> Callable[..., Any]:
        """A layer's own forward on weights of zero, noting how it was called."""
        original = type(layer).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if calls.ran and index <= calls.ran[-1]:
                raise UnsupportedError(f"{self.what} does not run its layers once each in order; not supported")
            calls.ran.append(index)
            calls.before.update(follow.take())
            calls.entered.append(list(walk((args, kwargs))))
            calls.inputs.append(rebuild((args, kwargs), lambda path, leaf: None))
            follow.paused = True
            with zero_weights(layer, self.device):
                out = original(layer, *args, **kwargs)
            follow.paused = False
            calls.results.append((out, args, kwargs))
            calls.left.append(list(walk(calls.results[-1])))
            for path, leaf in reversed(list(walk(out, (0,)))):
                if isinstance(leaf, Tensor):
                    follow.leaves_layer(leaf, len(calls.results) - 1, path)
            for _, leaf in calls.left[-1]:
                if isinstance(leaf, Tensor) and not any(leaf is old for _, old in calls.entered[-1]):
                    follow.mark(leaf, "layer")
            return out

        return forward

    def _watch(
        self,
        stack: ExitStack,
        events: list[tuple[str, Tensor, Any]],
        bases: list[tuple[str, Any]],
        phases: list[set[str]],
        follow: Follow,
    ) -> None:
        """Hooks on every module outside the layers: single ones note what they make of what, those that hold the
        layers what has been read when they end."""
        runner_name = name_of(self.model, self.runner)
        for name, module in self.model.named_modules():
            if not name.startswith(f"{runner_name}." if runner_name else "") or name == runner_name:
                continue
            if name == self.stack_name or name.startswith(f"{self.stack_name}."):
                continue
            if self.stack_name.startswith(f"{name}."):

                def ended(_: Any, __: Any, out: Any, name: str = name) -> None:
                    bases.append((name, out))
                    phases.append(follow.take())

                stack.callback(module.register_forward_hook(ended).remove)
            else:

                def ran(_: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                    given = next((leaf for _, leaf in walk((args, kwargs)) if isinstance(leaf, Tensor)), None)
                    if given is not None:
                        events.append((name, given, out))

                stack.callback(module.register_forward_hook(ran, with_kwargs=True).remove)


class _Ports:
    """How the state enters and leaves every layer, found from the first to the last by which tensors are the same.

    hidden: what enters the first one; extras: how many tensors beside it layers hand to later ones
    """

    def __init__(self, what: str, calls: _Calls, follow: Follow) -> None:
        entering = (leaf for _, leaf in calls.entered[0] if isinstance(leaf, Tensor) and leaf.is_floating_point())
        first = next((leaf for leaf in entering if "ids" in follow.of(leaf)), None)
        if first is None:
            raise UnsupportedError(
                f"{what}: its first layer takes nothing that follows from the token ids; not supported"
            )
        self.hidden: Tensor = first
        self._what, self._calls, self._follow = what, calls, follow
        self._chain = identity(first)  # of the hidden state, where it is now
        self._made: dict[tuple[Any, ...], tuple[int, Path]] = {}  # a tensor -> the layer that gave it, and where
        self._extra_of: dict[tuple[Any, ...], int] = {}
        self._gives: list[dict[int, Path]] = [{} for _ in calls.results]

    @property
    def extras(self) -> int:
        return len(self._extra_of)

    def of_all(self) -> list[LayerPort]:
        """Raises UnsupportedError where not one hidden state goes from layer to layer."""
        calls, outs, entries = self._calls, [], []
        for index in range(len(calls.results)):
            if index:
                outs.append(self._leaves(index - 1))
            entries.append(self._enters(index))
            old = {id(leaf) for _, leaf in calls.entered[index]}
            for path, leaf in calls.left[index]:
                if isinstance(leaf, Tensor) and id(leaf) not in old:
                    self._made.setdefault(identity(leaf), (index, path))
        outs.append(self._leaves_last())
        ports = []
        for index, (result, _, _) in enumerate(calls.results):
            if outs[index][0] != 0:
                raise UnsupportedError(f"{self._what}: layer {index} returns no hidden state; not supported")
            shapes = rebuild(result, lambda path, leaf: Was.of(leaf) if isinstance(leaf, Tensor) else leaf)
            where, reads = entries[index]
            ports.append(LayerPort(calls.inputs[index], where, reads, shapes, outs[index], self._gives[index]))
        return ports

    def _enters(self, index: int) -> tuple[Path, dict[Path, int]]:
        """Where a layer is given the hidden state, and where extras."""
        where: Path | None = None
        reads: dict[Path, int] = {}
        for path, leaf in self._calls.entered[index]:
            if not isinstance(leaf, Tensor):
                continue
            key = identity(leaf)
            if key == self._chain and where is None:
                where = path
            elif key in self._made:
                maker, place = self._made[key]
                number = self._extra_of.setdefault(key, len(self._extra_of))
                self._gives[maker][number] = place
                reads[path] = number
            elif "layer" in self._follow.of(leaf):
                raise UnsupportedError(
                    f"{self._what}: computes {'.'.join(map(str, path))} of layer {index} between its layers; "
                    f"not supported"
                )
        assert where is not None, "checked as the layer before it was left"
        return where, reads

    def _leaves(self, index: int) -> Path:
        """Where a layer leaves the hidden state that enters the next one."""
        here = {identity(leaf) for _, leaf in self._calls.entered[index + 1] if isinstance(leaf, Tensor)}
        candidates = [
            (path, leaf)
            for path, leaf in self._calls.left[index]
            if isinstance(leaf, Tensor) and leaf.shape == self.hidden.shape and identity(leaf) in here
        ]
        fresh = [entry for entry in candidates if self._is_made_by(index, entry[1])]
        fresh = fresh or [entry for entry in candidates if identity(entry[1]) == self._chain]  # changed in place
        if not fresh:
            raise UnsupportedError(
                f"{self._what}: what enters layer {index + 1} is not what leaves layer {index}; not supported"
            )
        self._chain = identity(fresh[0][1])
        return fresh[0][0]

    def _leaves_last(self) -> Path:
        end = len(self._calls.results) - 1
        for path, leaf in self._calls.left[end]:
            if isinstance(leaf, Tensor) and leaf.shape == self.hidden.shape and self._is_made_by(end, leaf):
                return path
        raise UnsupportedError(f"{self._what}: its last layer returns nothing of the hidden state's shape")

    def _is_made_by(self, index: int, tensor: Tensor) -> bool:
        return self._made.get(identity(tensor), (None,))[0] == index


# Linear maps, and those by the experts' matrices [experts, in, out] that tokens are sorted by.
_PRODUCTS = (nn.functional.linear, *filter(None, [getattr(torch, "_grouped_mm", None)]))


class _ProductsOfZeros(TorchFunctionMode):
    """Inside, linear maps by weights that are all zeros do not multiply: what they give is zeros of that shape, made of
    the same tensors. storages: of the weights"""

    def __init__(self, storages: Container[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1 and storage_of(args[1]) in self._storages:
            x, weight, *rest = args
            is_linear = func is nn.functional.linear
            width = weight.shape[0 if is_linear else -1]
            out = x[..., :1] * weight.as_strided((width,), (0,))  # which reads one value of all
            bias = (rest[0] if rest else (kwargs or {}).get("bias")) if is_linear else None
            return out if bias is None else out + bias
        return func(*args, **(kwargs or {}))


def unwritten_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of any shape that take no memory and no time on a CPU until they are read or written, be they larger than
    it: torch.zeros writes them, a second for every gigabyte."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if sys.platform != "linux" or count * dtype.itemsize < mmap.PAGESIZE:
        return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@contextmanager
def zeros_outside(model: nn.Module, stack_name: str, device: torch.device) -> Iterator[dict[int, str]]:
    """Inside, zeros that take no memory are in place of every weight outside the layers that is not loaded; yields
    their storages and names."""
    found: dict[int, str] = {}
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for prefix, module in model.named_modules(remove_duplicate=False):
            if prefix.startswith(f"{stack_name}."):
                continue
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is None or not value.is_meta:
                        continue
                    zero = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
                    kept.append((table, name, value))
                    is_parameter = isinstance(value, nn.Parameter)
                    table[name] = nn.Parameter(zero, requires_grad=False) if is_parameter else zero
                    found[storage_of(zero)] = f"{prefix}.{name}" if prefix else name
        with _ProductsOfZeros(found):
            yield found
    finally:
        for table, name, value in kept:
            table[name] = value


@contextmanager
def zero_weights(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Zeros in place of a layer's weights; a CPU gives memory to none of them that are not written to."""
    kept = []
    storages: set[int] = set()
    for module in layer.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, value in table.items():
                if value is not None and value.is_meta:
                    kept.append((table, name, value))
                    zero = unwritten_zeros(value.shape, value.dtype, device)
                    storages.add(storage_of(zero))
                    table[name] = nn.Parameter(zero, requires_grad=False) if isinstance(value, nn.Parameter) else zero
    try:
        with _ProductsOfZeros(storages):
            yield
    finally:
        for table, name, value in kept:
            table[name] = value


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted name of a module within a model."""
    return next(name for name, found in model.named_modules() if found is module)


def result_of(base_output: Any) -> Tensor:
    """The hidden states that a base model returns, as a rule [rows, tokens, hidden]."""
    if isinstance(base_output, Tensor):
        return base_output
    found = getattr(base_output, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else base_output[0]


def _norm_of(events: Sequence[tuple[str, Tensor, Any]], last: Tensor, base_output: Any) -> str | None:
    result = identity(result_of(base_output))
    if identity(last) == result:
        return ""
    for name, given, out in reversed(events):
        if isinstance(out, Tensor) and identity(out) == result and identity(given) == identity(last):
            return name
    return None
