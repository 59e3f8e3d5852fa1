"""Run a causal language model layer by layer, its weights arriving from any weight source and leaving again.

transformers supplies the modules and the way through them: the model's own forward runs, with the layers' part of it
taken over. Parameters and persistent buffers live on the meta device until they are asked for; other buffers (rotary
tables) are real. One run on the base model's rows, its layers skipped, gives every layer's call arguments (masks,
positions, rotary tables, which differ per layer type), so that any layer can be replayed from a stored state.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recompile.checkpoint.checkpoint import WeightSource, split_name
from recompile.checkpoint.config_fields import config_place
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_ahead
from recompile.errors import MismatchError, MissingWeight, UnsupportedError
from recompile.formats import FORMATS
from recompile.io.memory import release_freed
from recompile.model.chunked import TRIED_TOKENS, ChunkedLayout, Pieces, not_in_pieces
from recompile.model.finite import FiniteWatch
from recompile.model.fused_experts import is_flat, is_transposed
from recompile.model.known_types import check_next_token
from recompile.model.load_writes import Written, written_while_loading
from recompile.model.one_block import Block, BlockLayout, find_block, record_block
from recompile.model.own_forward import (
    OF_MODELS,
    PROBE_TOKENS,
    Probe,
    Reached,
    Structure,
    name_of,
    patched,
    result_of,
    run_own,
    zeros_outside,
)
from recompile.model.skeleton import (
    Origin,
    build_skeleton,
    check_nothing_left,
    dense_names,
    find_origins,
    find_runner,
    find_stack,
    module_of,
    one_line,
    transformers_config,
)
from recompile.model.states import Layout, record_layout

__all__ = ["LayeredModel", "LinearWeights", "dense_names", "transformers_config"]

STRUCTURES_KEPT = 32  # of models, so that skeletons of one config need not be run on zeros again
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_dtype(device: str | torch.device) -> torch.dtype:
    """float32 on a CPU, where 16-bit arithmetic is slow and noisy; bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def sketch_dtype(device: str | torch.device) -> torch.dtype:
    """For what is linear in a change of weights, so that rounding costs it a relative error and no floor: bfloat16
    where the device multiplies that fast, on a CPU by instructions of its own."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    able = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if any(ask is not None and ask() for ask in able) else torch.float32


def release_free_memory(device: torch.device) -> None:
    """Give the pages of freed tensors back to the system once they are many; of a CPU's tensors, for others are not
    where glibc keeps books (asking it takes milliseconds where there are many threads).

    Layers that come and go leave the allocator holding many layers' worth of freed blocks, in pieces too small for the
    next one.
    """
    if device.type == "cpu":
        release_freed()


class _HiddenOnly:
    """A base model's output that holds a hidden state and says None to whatever else a head asks for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def get(self, name: str, default: Any = None) -> Any:
        return self.last_hidden_state if name == "last_hidden_state" else default

    def __getitem__(self, index: Any) -> Any:
        if index == "last_hidden_state":
            return self.last_hidden_state
        return (self.last_hidden_state,)[index]


_structures: dict[str, Structure] = {}


@dataclass
class LayeredModel:
    """The skeleton of one model; holds no weights until asked to load some.

    Build with `LayeredModel.of(source)`. One skeleton serves every weight source of the same architecture and the same
    tensor names: pass another `source` to the load methods.
    """

    source: WeightSource
    dtype: torch.dtype
    device: torch.device
    model: Any
    runner: Any
    layers: nn.ModuleList
    layers_name: str
    origins: dict[str, Origin] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)  # by transformers, over what it loads
    pieces: Pieces | None = None  # how rows run that are longer
    layouts: dict[int, Layout | BlockLayout | ChunkedLayout] = field(default_factory=dict)  # by tokens of a row
    watch: FiniteWatch = field(default_factory=FiniteWatch)  # sees every state that is handed on
    loaded_from: str = ""  # label of the source that was loaded last

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, source: WeightSource, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> LayeredModel:
        """The skeleton of `source`'s architecture, its weights on the meta device.

        Raises UnsupportedError for an architecture that transformers does not know or that is not one sequence of
        layers, and MissingWeight if the source lacks a weight or holds one that the model does not read.
        """
        device = torch.device(device)
        dtype = dtype or default_dtype(device)
        place = config_place(getattr(source, "label", "the checkpoint"))
        check_next_token(source.config, place)
        model = build_skeleton(source.config, dtype, device, place)
        layers_name, layers = find_stack(model)
        made = cls(source, dtype, device, model, find_runner(model, layers_name), layers, layers_name)
        made.origins, left = find_origins(model, source)
        made.written = written_while_loading(model)
        check_nothing_left(model, layers_name, len(layers), source, left, made.origins)
        if isinstance(made.structure, Block):
            made.layers, made.layers_name = nn.ModuleList([made.structure.part_of(model)]), made.structure.base
        made._check_complete()
        return made

    def _check_complete(self) -> None:
        label = getattr(self.source, "label", "the checkpoint")
        missing = [name for name in self._shapes if name not in self.origins and self._is_meta(name)]
        if missing:
            structure = self.structure
            outside = {*structure.before, *structure.after, *structure.head}
            missing = [name for name in missing if name in outside or name.startswith(f"{self.layers_name}.")]
        if missing:
            raise MissingWeight(
                f"{label}: holds nothing for {len(missing)} of the model's weights, first {missing[0]}; "
                f"the checkpoint is incomplete, or config.json is another model's"
            )
        for name, origin in self.origins.items():
            counts = Counter(origin.patterns)
            if len(set(counts.values())) > 1:
                found = ", ".join(f"{count} of {pattern}" for pattern, count in counts.items())
                raise MissingWeight(f"{label}: {name} is made of as many tensors of each kind, it has {found}")

    @cached_property
    def structure(self) -> Structure:
        """What the model's own forward does around its layers. Raises UnsupportedError, in one sentence, for a model
        that does not run one sequence of layers."""
        config = {key: value for key, value in self.source.config.items() if key != "quantization_config"}
        key = json.dumps([type(self.model).__name__, str(self.dtype), str(self.device), config], default=str)
        if key not in _structures:
            probe = Probe(
                self.model, self.runner, list(self.layers), self.layers_name, self.device, type(self.model).__name__
            )
            while len(_structures) >= STRUCTURES_KEPT:
                del _structures[next(iter(_structures))]
            try:
                _structures[key] = self._probed(probe)
            except OF_MODELS as error:
                raise UnsupportedError(
                    f"{type(self.model).__name__} of transformers does not run on text alone with this config.json: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error
        return _structures[key]

    def _probed(self, probe: Probe) -> Structure:
        """As a sequence of layers or, where that fails, as one block. Raises what the first of both says."""
        try:
            found = probe.run()
            with zeros_outside(self.model, self.layers_name, self.device):
                ids = torch.zeros(1, PROBE_TOKENS + 2, dtype=torch.int64, device=self.device)
                layers = list(self.layers)
                record_layout(found, self.model, self.runner, layers, self.layers_name, ids, self.dtype)
        except (UnsupportedError, *OF_MODELS) as error:
            try:
                return find_block(self.model, self.runner, self.layers_name, self.device)
            except UnsupportedError as other:
                raise (error if isinstance(error, UnsupportedError) else other) from None
            except OF_MODELS:
                raise error from None
        return found

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of what the head takes."""
        return int(self.head.weight.shape[1])

    def state_size(self, tokens: int) -> int:
        """Values that a state of rows of so many tokens holds for each of them."""
        structure = self.structure
        if tokens not in self.layouts:
            with self._loaded(structure.before, None):
                self.record(torch.zeros(1, tokens, dtype=torch.int64))
        return self.layouts[tokens].width

    def prefix_of_layer(self, index: int) -> str:
        if isinstance(self.structure, Block):
            return self.structure.base
        return f"{self.layers_name}.{index}"

    def prefix_of(self, module: nn.Module) -> str:
        """The dotted name of a submodule within the model."""
        if isinstance(self.structure, Block) and module is self.layers[0]:
            return self.structure.base
        return name_of(self.model, module)

    @property
    def embedding(self) -> Any:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Any:
        return self.runner.get_output_embeddings()

    # ---- weights --------------------------------------------------------------------------------------------------

    def load_parameter(self, name: str, source: WeightSource | None = None) -> Tensor:
        """The value of one parameter or buffer (its full name in the transformers model) in the dtype that transformers
        gives it where it computes in `dtype`, on the device.

        Of the parameter's shape, [out, in] or [in, out] of a matrix; padded formats are cut to it. Raises MismatchError
        where the shapes do not fit.
        """
        value = self._stored_value(name, source or self.source)
        return self.written[name].over(value) if name in self.written else value

    def _stored_value(self, name: str, source: WeightSource) -> Tensor:
        origin = self.origins[name]
        wanted = self._shapes[name]
        if origin.converter is None:
            value = source.load(origin.tensors[0], device=self.device)
            stored = source.modules.get(module_of(source, origin.tensors[0]))
            if stored is not None and stored.is_quantized and self._is_turned(name):
                value = value.T  # quantized weights are [out, in] whatever the model has
            return self._fit(source, origin.tensors[0], value, wanted).to(self._dtypes[name])
        return self._convert(name, list(zip(origin.tensors, origin.patterns, strict=True)), wanted, source)

    def _convert(
        self, name: str, tensors: list[tuple[str, str | None]], wanted: tuple[int, ...], source: WeightSource
    ) -> Tensor:
        """A parameter that transformers makes of several checkpoint tensors, or what some of them make of it."""
        converter = copy.deepcopy(self.origins[name].converter)
        for tensor, pattern in tensors:
            value = source.load(tensor, device=self.device).to(self.dtype)
            converter.add_tensor(self.origins[name].made_as, tensor, pattern, value)
        try:
            made = converter.convert(self.origins[name].made_as, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError) as error:
            label = getattr(source, "label", "the checkpoint")
            raise MismatchError(
                f"{label}: the {len(tensors)} tensors that make {name}, first {tensors[0][0]}, do not fit "
                f"together: {error}"
            ) from error
        value = made[name]
        value = value[0] if isinstance(value, list) else value
        return self._fit(source, name, value, wanted).to(self._dtypes[name])

    def _is_turned(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a Conv1D, [in, out]."""
        owner, leaf = split_name(parameter)
        return leaf == "weight" and type(self.model.get_submodule(owner)).__name__ == "Conv1D"

    def is_turned(self, module: str) -> bool:
        """Whether a dense checkpoint stores the weight of `module` as [in, out]; quantized ones are [out, in]."""
        return module in self._turned_modules

    @cached_property
    def _turned_modules(self) -> frozenset[str]:
        """By one look at every parameter: asked for each of 100,000 modules."""
        turned = (origin for name, origin in self.origins.items() if self._is_turned(name))
        return frozenset(module_of(self.source, tensor) for origin in turned for tensor in origin.tensors)

    def expert_of(self, module: str) -> tuple[str, int] | None:
        """(parameter, expert) of a checkpoint module that transformers keeps as one slice of a fused 3-D parameter.

        None for a module that has a parameter of its own, or that is not told apart expert by expert.
        """
        return self._experts.get(module)

    @cached_property
    def _experts(self) -> dict[str, tuple[str, int]]:
        found = {}
        for name, origin in self.origins.items():
            count = self._shapes[name][0] if origin.converter is not None and len(self._shapes[name]) == 3 else 0
            counts = Counter(origin.patterns)
            if count and all(number == count for number in counts.values()):
                seen: Counter[str | None] = Counter()
                for tensor, pattern in zip(
                    origin.tensors, origin.patterns, strict=True
                ):  # pattern by pattern, in order
                    found[module_of(self.source, tensor)] = (name, seen[pattern])
                    seen[pattern] += 1
        return found

    def load_expert(self, name: str, expert: int, source: WeightSource | None = None) -> Tensor:
        """`load_parameter(name, source)[expert]` of a fused parameter, reading that expert's tensors only."""
        origin = self.origins[name]
        seen: Counter[str | None] = Counter()
        chosen = []
        for tensor, pattern in zip(origin.tensors, origin.patterns, strict=True):
            if seen[pattern] == expert:
                chosen.append((tensor, pattern))
            seen[pattern] += 1
        return self._convert(name, chosen, (1, *self._shapes[name][1:]), source or self.source)[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model by its name in transformers, with its shape."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and persistent buffer."""
        return {name: tuple(value.shape) for name, value in self.model.state_dict(keep_vars=True).items()}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """What every parameter and persistent buffer is in the model that transformers would load."""
        state = self.model.state_dict(keep_vars=True)
        plan = self.model._get_dtype_plan(self.dtype)
        if not plan:
            return {name: value.dtype for name, value in state.items()}
        kept = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in plan))
        wide = next(iter(plan.values()))
        return {name: wide if kept.search(name) else value.dtype for name, value in state.items()}

    def _is_meta(self, name: str) -> bool:
        return self._value(name).is_meta

    def _fit(self, source: WeightSource, name: str, value: Tensor, wanted: tuple[int, ...]) -> Tensor:
        if is_flat(name) and value.dim() == 2 and value.numel() == math.prod(wanted):
            return value.view(wanted)
        if tuple(value.shape) != wanted:
            stored = source.modules.get(split_name(name)[0])
            padded = stored is not None and FORMATS[stored.format].pads_to is not None
            if not padded or value.dim() != len(wanted) or any(h < w for h, w in zip(value.shape, wanted, strict=True)):
                label = getattr(source, "label", "the checkpoint")
                raise MismatchError(
                    f"{label}: {name} is {list(value.shape)}, the model of its config.json wants {list(wanted)}"
                )
            value = value[tuple(slice(0, size) for size in wanted)]
        return value

    def load(self, module: nn.Module, prefix: str, source: WeightSource | None = None) -> None:
        """Give every parameter and persistent buffer below `module` (at `prefix`) its value."""
        self.loaded_from = getattr(source or self.source, "label", "") or "the model"
        for name in self._names_in(module, prefix):
            self.set_parameter(module, name, self.load_parameter(f"{prefix}.{name}", source))

    def unload(self, module: nn.Module) -> None:
        """Send every parameter and persistent buffer below `module` back to the meta device."""
        prefix = self.prefix_of(module)
        for name in self._names_in(module, prefix):
            self.set_parameter(module, name, self._empty(f"{prefix}.{name}"))
        release_free_memory(self.device)

    def _names_in(self, module: nn.Module, prefix: str) -> list[str]:
        names = [name for name, _ in module.named_parameters()]
        names += [name for name, _ in module.named_buffers() if f"{prefix}.{name}" in self._shapes]
        return [name for name in names if f"{prefix}.{name}" in self.origins]

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=self._dtypes[name], device="meta")

    @staticmethod
    def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
        """Put a value of any shape in the place of a parameter or buffer."""
        owner, leaf = split_name(name)
        target = module.get_submodule(owner) if owner else module
        if leaf in target._buffers:
            target._buffers[leaf] = value
        else:
            target._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @contextmanager
    def loaded(self, module: nn.Module, prefix: str, source: WeightSource | None = None) -> Iterator[nn.Module]:
        """`module` with its weights, for the length of the block."""
        try:
            self.load(module, prefix, source)
            yield module
            self.watch.settle()
        finally:
            self.unload(module)

    def load_named(self, names: Iterable[str], source: WeightSource | None = None) -> None:
        """Give these parameters and buffers of the model their values, for good."""
        self.loaded_from = getattr(source or self.source, "label", "") or "the model"
        for name in names:
            if name in self.origins:
                self.set_parameter(self.model, name, self.load_parameter(name, source))

    @contextmanager
    def _loaded(self, names: Iterable[str], source: WeightSource | None) -> Iterator[None]:
        """Some weights for the length of the block; then what was there before."""
        kept = {name: self._value(name) for name in names if name in self.origins}
        try:
            self.load_named(kept, source)
            yield
            self.watch.settle()
        finally:
            for name, value in kept.items():
                self.set_parameter(self.model, name, value)
            release_free_memory(self.device)

    def _value(self, name: str) -> Tensor:
        owner, leaf = split_name(name)
        module = self.model.get_submodule(owner)
        value = module._buffers[leaf] if leaf in module._buffers else module._parameters[leaf]
        assert value is not None, "it is in the state"
        return value

    @contextmanager
    def layer(self, index: int, source: WeightSource | None = None) -> Iterator[nn.Module]:
        """Layer `index` with its weights, for the length of the block; the system is asked to read the next one's."""
        with self.loaded(self.layers[index], self.prefix_of_layer(index), source) as layer:
            if index + 1 < self.depth:
                stored = (source or self.source).modules
                names = (name for name in self.modules_of_layer(index + 1) if name in stored)
                read_ahead(info for name in names for info in stored[name].parts.values())
            for layout in self.layouts.values():
                if isinstance(layout, ChunkedLayout):
                    layout.try_layer(index, layer)
            yield layer

    def modules_of_layer(self, index: int) -> list[str]:
        """Checkpoint modules whose tensors make up this layer, in the order of its parameters."""
        return list(self._modules_of_layers[index])

    @cached_property
    def _modules_of_layers(self) -> list[dict[str, None]]:
        """Of every layer, by one look at every name."""
        found: list[dict[str, None]] = [{} for _ in self.layers]
        if isinstance(self.structure, Block):  # what lies under its name is more than it
            prefix = self.structure.base
            places = {f"{prefix}.{name}": 0 for name in self._names_in(self.layers[0], prefix)}
        else:
            start = f"{self.layers_name}."
            rests = {name: name[len(start) :] for name in self.origins if name.startswith(start)}
            places = {name: int(rest.partition(".")[0]) for name, rest in rests.items()}
        for name, origin in self.origins.items():
            if name in places:
                found[places[name]].update((module_of(self.source, tensor), None) for tensor in origin.tensors)
        return found

    def parameters_of(self, module: str) -> list[str]:
        """Names of the parameters that the checkpoint module `module` takes part in."""
        return [
            name
            for name, origin in self.origins.items()
            if any(module_of(self.source, tensor) == module for tensor in origin.tensors)
        ]

    def is_head(self, module: str) -> bool:
        """Whether the output head is made of the checkpoint module `module`: it is the head, or an embedding tied to
        it."""
        return role_of(module) == "head" or f"{self.prefix_of(self.head)}.weight" in self.parameters_of(module)

    @contextmanager
    def whole_loaded(self, source: WeightSource | None = None) -> Iterator[Any]:
        """All weights of the text model in memory: the model itself, to be called as transformers' own."""
        with self._loaded(list(self.origins), source), self._towers_there():
            yield self.runner

    @contextmanager
    def streamed(self, held: int = 0, source: WeightSource | None = None) -> Iterator[Any]:
        """As `whole_loaded`, with the weights of only `held` layers (the first ones) in memory and of one more while it
        runs: each pass reads the others anew, whatever state (a key-value cache) the model keeps between passes.

        Raises UnsupportedError for a model that is run as one block.
        """
        if isinstance(self.structure, Block):
            raise UnsupportedError(f"{type(self.model).__name__} is run as one block, all its weights in memory")

        def reading(index: int) -> Callable[..., Any]:
            layer = self.layers[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                with self.layer(index, source):
                    return type(layer).forward(layer, *args, **kwargs)

            return forward

        read_anew = tuple(f"{self.layers_name}.{index}." for index in range(held, self.depth))
        there = [name for name in self.origins if not name.startswith(read_anew)]
        rest = range(held, self.depth)
        with (
            self._loaded(there, source),
            self._towers_there(),
            patched([self.layers[index] for index in rest], [reading(index) for index in rest]),
        ):
            yield self.runner

    # ---- running --------------------------------------------------------------------------------------------------

    def embed(
        self, ids: Tensor, batch: int, source: WeightSource | None = None, *, first_row: int = 0
    ) -> Iterator[Tensor]:
        """The states that enter the first layer, a batch of rows at a time; ids [rows, tokens] -> [batch, tokens,
        width], where the width is that of the hidden state for most architectures.

        first_row: what messages call the first one. Records the arguments of every layer's call for this row length.
        Raises NotFiniteError.
        """
        with self.embedding_loaded(source) as first_state:
            self.record(ids[:1])
            for number, rows in enumerate(ids.split(batch)):
                yield first_state(rows, first_row + number * batch)

    @contextmanager
    def embedding_loaded(self, source: WeightSource | None = None) -> Iterator[Callable[[Tensor, int], Tensor]]:
        """Inside, what is read before the layers is loaded; yields what makes the state [rows, tokens, width] that
        enters the first layer, of ids [rows, tokens] of a length that was recorded and what messages call the first
        row."""

        def first_state(rows: Tensor, first_row: int) -> Tensor:
            with self._towers_there():
                first = self.layouts[rows.shape[1]].first(self.runner, list(self.layers), rows.to(self.device))
            self.watch.see(first, self.loaded_from, "the embedding", first_row, self.embedding)
            return first

        with self._loaded(self.structure.before, source):
            yield first_state

    def record(self, ids: Tensor) -> None:
        """Note every layer's call arguments for rows of this length, int64 [rows, tokens]. What is read before the
        layers must be loaded."""
        ids = ids[:1].to(self.device)
        if isinstance(self.structure, Block):
            found = record_block(self.structure, self.model, self.runner, ids, self.dtype)
            self.layouts[ids.shape[1]] = found
            return
        in_pieces = self.pieces is not None and ids.shape[1] > max(self.pieces.tokens, TRIED_TOKENS)
        self.layouts[ids.shape[1]] = self._record_in_pieces(ids) if in_pieces else self._record_whole(ids)

    def _record_whole(self, ids: Tensor) -> Layout:
        with self._towers_there():
            return record_layout(
                self.structure, self.model, self.runner, list(self.layers), self.layers_name, ids, self.dtype
            )

    def _record_in_pieces(self, ids: Tensor) -> Layout | ChunkedLayout:
        """In pieces where the model can. Raises UnsupportedError where it cannot and has to."""

        def record_later(ids: Tensor) -> Layout:
            with self._loaded(self.structure.before, None):
                return self._record_whole(ids)

        assert self.pieces is not None, "somebody has asked for them"
        trial = self._record_whole(ids[:, :TRIED_TOKENS])
        way = self.model, self.runner, list(self.layers), self.layers_name
        found = ChunkedLayout(*way, self.device, trial, ids.shape[1], self.pieces, record_later)
        with self._towers_there():
            why_not = found.why_not(ids)
        if why_not and self.pieces.needed:
            raise not_in_pieces(type(self.model).__name__, ids.shape[1], why_not)
        return self._record_whole(ids) if why_not else found

    def _towers_there(self) -> AbstractContextManager[Any]:
        """Inside, weights that are not loaded are zeros, for models that ask their first weight for its device."""
        if any(module.device.type == "meta" for module in self._on_the_way):
            return zeros_outside(self.model, self.layers_name, self.device)
        return nullcontext()

    @cached_property
    def _on_the_way(self) -> list[Any]:
        """The models around the layers."""
        return [
            module
            for name, module in self.model.named_modules()
            if hasattr(type(module), "device") and (not name or self.layers_name.startswith(f"{name}."))
        ]

    def run_layer(self, index: int, state: Tensor, first_row: int = 0) -> Tensor:
        """Replay one loaded layer; state [batch, tokens, width], any batch, a row length that was recorded.

        first_row: what messages call the batch's first row. A state whose rows run in pieces is written to, and is what
        comes back. Raises NotFiniteError; on a device, where nobody waits for every state, at the end of the block that
        loaded the layer, or before logits are made.
        """
        out = self.layouts[state.shape[1]].run(index, self.layers[index], state)
        self.watch.see(out, self.loaded_from, f"layer {index}", first_row, self.layers[index])
        return out

    def hidden_of(self, state: Tensor) -> Tensor:
        """The hidden state [batch, tokens, ...] flattened to one width, of a state; most states are no more than it."""
        layout = next(iter(self.layouts.values()))
        return state if layout.is_plain else state[..., : layout.hidden_width]

    def norm(self, state: Tensor) -> Tensor:
        """What the head takes [batch, tokens, hidden], of states that leave the last layer; see `norm_loaded`."""
        layout = next(iter(self.layouts.values()))
        hidden = layout.hidden_of(state)
        name = self.structure.norm
        if name is not None or isinstance(layout, BlockLayout):
            if not name or self.pieces is None or not layout.is_plain:
                return self.model.get_submodule(name)(hidden) if name else hidden
            module = self.model.get_submodule(name)
            return torch.cat([module(part) for part in hidden.split(self.pieces.tokens, 1)], 1)
        assert isinstance(layout, Layout), "rows run in pieces where one norm is all"
        found: list[Tensor] = []
        base = self.model.get_submodule(self.structure.base)

        def ended(*args: Any, **kwargs: Any) -> Any:
            found.append(result_of(type(base).forward(base, *args, **kwargs)))
            raise Reached

        ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=self.device)
        stand_ins = layout.stand_ins(lambda number, args, kwargs: None, last=hidden)
        with (
            zeros_outside(self.model, self.layers_name, self.device),
            patched([*layout.running(list(self.layers)), base], [*stand_ins, ended]),
            suppress(Reached),
        ):
            run_own(self.runner, ids)
        return found[0]

    @property
    def norm_module(self) -> nn.Module:
        """What makes what the head takes of the last state: a norm, or the base model where it takes more than one."""
        return self.model.get_submodule(self.structure.norm or self.structure.base)

    def logits(self, normed: Tensor, first_row: int | None = None) -> Tensor:
        """Logits [batch, tokens, vocab] of what `norm` gives; the head must be loaded. Soft caps and logit scales of
        the architecture are applied, as its own forward does. Raises NotFiniteError for states that are not finite.
        """
        self.watch.see(normed, self.loaded_from, "the final norm", first_row, self.norm_module)
        ids = torch.zeros(normed.shape[:2], dtype=torch.int64, device=normed.device)
        base = self.model.get_submodule(self.structure.base)
        with patched([base], [lambda *args, **kwargs: _HiddenOnly(normed)]):
            return run_own(self.runner, ids).logits

    @contextmanager
    def head_loaded(self, source: WeightSource | None = None) -> Iterator[nn.Module]:
        with self._loaded(self.structure.head, source):
            yield self.head

    def load_head(self) -> None:
        """Until it is unloaded by hand."""
        self.load_named(self.structure.head)

    @contextmanager
    def norm_loaded(self, source: WeightSource | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, what is between the last layer and the head is loaded; yields it: [rows, tokens, width] of a state ->
        [rows, tokens, hidden]."""
        with self._loaded(self.structure.after, source):
            yield self.norm

    @torch.no_grad()
    def normed(self, ids: Tensor, batch: int, source: WeightSource | None = None) -> Tensor:
        """What the head takes [rows, tokens, hidden], of token rows [rows, tokens] that run through the whole model
        `batch` at a time. Raises NotFiniteError."""
        states = list(self.embed(ids, batch, source))
        for index in range(self.depth):
            with self.layer(index, source):
                for number, state in enumerate(states):
                    states[number] = self.run_layer(index, state, number * batch)
        with self.norm_loaded(source) as norm:
            return torch.cat([norm(state) for state in states])

    def load_norm(self) -> None:
        """Until it is unloaded by hand."""
        self.load_named(self.structure.after)

    def head_is_linear(self, normed: Tensor) -> bool:
        """Whether logits are exactly `head(hidden)`, with no soft cap or scale after it. The head must be loaded.

        normed: [rows, tokens, hidden], to try it on
        """
        head = self.head
        takes_it = isinstance(head, nn.Linear) and head.in_features == normed.shape[-1]  # else a transform is between
        return takes_it and torch.equal(self.logits(normed), head(normed.to(head.weight.dtype)))


@dataclass(frozen=True)
class LinearWeight:
    """What one weight handed to `torch.nn.functional.linear` is: [out, in], or one expert's slice of a 3-D parameter.

    modules: the checkpoint modules whose rows make it up, one after another along `out`, or row by row in turn
    (`alternating`)
    parameter: its full name in the model; expert: the slice, None for a 2-D parameter
    transposed: the parameter is [in, out], or [experts, in, out]
    """

    modules: tuple[str, ...]
    parameter: str
    expert: int | None = None
    transposed: bool = False
    alternating: bool = False


class LinearWeights:
    """Tells, for one loaded layer, which checkpoint modules a weight belongs to, by its address.

    Nothing here knows architectures. Experts that transformers keeps fused in one 3-D parameter are told apart by the
    slice of it that a call reads (experts implementation "eager": one linear call an expert).
    """

    def __init__(self, model: LayeredModel, index: int) -> None:
        self._whole: dict[int, LinearWeight] = {}  # address of a 2-D weight
        self._slices: dict[int, tuple[int, list[LinearWeight]]] = {}  # address of a 3-D one: bytes a slice, experts
        prefix = model.prefix_of_layer(index)
        for name, parameter in model.layers[index].named_parameters():
            full = f"{prefix}.{name}"
            origin = model.origins.get(full)
            if origin is None:
                continue
            modules = [module_of(model.source, tensor) for tensor in origin.tensors]
            if parameter.dim() == 2 and name.endswith("weight"):
                turned = type(model.model.get_submodule(full.rpartition(".")[0])).__name__ == "Conv1D"
                self._whole[parameter.data_ptr()] = LinearWeight(tuple(modules), full, transposed=turned)
            elif parameter.dim() == 3 and origin.converter is not None and len(modules) % len(parameter) == 0:
                by_pattern: dict[str | None, list[str]] = {}  # a fused parameter lists them pattern by pattern
                for module, pattern in zip(modules, origin.patterns, strict=True):
                    by_pattern.setdefault(pattern, []).append(module)
                block = model.model.get_submodule(full.rpartition(".")[0])
                turned = getattr(origin.converter, "transposed", is_transposed(block))
                how = turned, getattr(block, "is_concatenated", True) is False and len(by_pattern) > 1
                experts = [
                    LinearWeight(tuple(found[e] for found in by_pattern.values()), full, e, *how)
                    for e in range(len(parameter))
                ]
                self._slices[parameter.data_ptr()] = (parameter[0].numel() * parameter.element_size(), experts)

    def __iter__(self) -> Iterator[LinearWeight]:
        yield from self._whole.values()
        for _, experts in self._slices.values():
            yield from experts

    def find(self, weight: Tensor) -> LinearWeight | None:
        """What a weight [out, in] is that a linear map is called with; None for one that is none of the layer's."""
        address = weight.data_ptr()
        if address in self._whole:
            return self._whole[address]
        for start, (stride, experts) in self._slices.items():
            if start <= address < start + stride * len(experts) and weight.dim() == 2:
                return experts[(address - start) // stride]
        return None

    def holds(self, weight: Tensor) -> bool:
        """Whether a tensor is the whole parameter, [experts, ..., ...], of all experts of a layer."""
        return weight.dim() == 3 and weight.data_ptr() in self._slices


def check_same_skeleton(reference: LayeredModel, candidate: LayeredModel) -> None:
    """Raise MismatchError unless two models have the same layers, hidden size and vocabulary."""
    for what, left, right in (
        ("layers", reference.depth, candidate.depth),
        ("hidden size", reference.hidden_size, candidate.hidden_size),
        ("vocabulary", reference.vocab_size, candidate.vocab_size),
    ):
        if left != right:
            raise MismatchError(
                f"{getattr(candidate.source, 'label', 'A')} and {getattr(reference.source, 'label', 'B')} are not "
                f"builds of one model: {what} {right} against {left}"
            )
