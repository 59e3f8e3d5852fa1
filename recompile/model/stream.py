"""Run a causal language model layer by layer, its weights arriving from any weight source and leaving again.

transformers supplies the modules. Parameters live on the meta device; buffers (rotary tables) are real. One pass over
the base model with recording stand-ins for its layers gives every layer's call arguments (masks, positions, rotary
tables, which differ per layer type), so that any layer can be replayed from a stored hidden state.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recompile.checkpoint.checkpoint import WeightSource, split_name
from recompile.checkpoint.module_names import role_of
from recompile.errors import CheckpointError, MismatchError, MissingWeight, UnsupportedError
from recompile.model.finite import FiniteWatch

FREE_BYTES_KEPT = 64 * 2**20  # of freed blocks that the allocator may hold on to
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
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


class _HeapFigures(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, the ninth of which is the bytes of freed blocks."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is a glibc that can count and give back freed memory."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _HeapFigures
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library


def release_free_memory(device: torch.device) -> None:
    """Give the pages of freed tensors back to the system once they are many; of a CPU's tensors, for others are not
    where glibc keeps books (asking it takes milliseconds where there are many threads).

    glibc keeps freed blocks of a few MiB, and layers that come and go leave it holding many layers' worth of them, in
    pieces too small for the next one. A little is left to it: pages given back have to be asked for again.
    """
    glibc = _glibc() if device.type == "cpu" else None
    if glibc is not None and glibc.mallinfo2().field8 > FREE_BYTES_KEPT:
        glibc.malloc_trim(0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter a module registers goes to the meta device; buffers stay real.

    Building under `torch.device("meta")` would lose the values of buffers that no checkpoint holds.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and passes the hidden state on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # attributes that the model's loop reads, e.g. attention_type
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((hidden_states, args, kwargs))
        return hidden_states


class _HiddenOnly:
    """A base model's output that holds a hidden state and says None to whatever else a head asks for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class _Passthrough(nn.Module):
    """Stands in for the base model when only the head is to run."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _HiddenOnly(self.hidden)


@dataclass(frozen=True)
class _Origin:
    """How one parameter is made: the checkpoint tensors it needs and transformers' converter, if any."""

    tensors: tuple[str, ...]
    patterns: tuple[str | None, ...]
    converter: Any = None


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
    base: Any
    layers: nn.ModuleList
    norm_name: str
    layers_name: str
    origins: dict[str, _Origin] = field(default_factory=dict)
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    watch: FiniteWatch = field(default_factory=FiniteWatch)  # sees every state that is handed on
    loaded_from: str = ""  # label of the source that was loaded last

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, source: WeightSource, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> LayeredModel:
        """The skeleton of `source`'s architecture, parameters on the meta device.

        Raises UnsupportedError for an architecture that transformers does not know or that is not a plain stack of
        layers, and MissingWeight if the source lacks a parameter.
        """
        device = torch.device(device)
        dtype = dtype or default_dtype(device)
        model = _skeleton(source.config, dtype, device)
        base = getattr(model, model.base_model_prefix, None)
        if base is None or base is model:
            raise UnsupportedError(f"{type(model).__name__} has no base model under its head; cannot be streamed")
        layers_name, layers = _find_layers(base, source.config)
        norm_name = next((name for name in NORM_NAMES if isinstance(getattr(base, name, None), nn.Module)), None)
        if norm_name is None:
            raise UnsupportedError(f"{type(base).__name__} has no final norm under any of the names {NORM_NAMES}")
        made = cls(source, dtype, device, model, base, layers, norm_name, layers_name)
        made.origins = _origins(model, source)
        made._check_complete()
        return made

    def _check_complete(self) -> None:
        missing = [name for name, _ in self.model.named_parameters() if name not in self.origins]
        if missing:
            label = getattr(self.source, "label", "the checkpoint")
            raise MissingWeight(
                f"{label}: holds nothing for {len(missing)} of the model's parameters, first {missing[0]}; "
                f"the checkpoint is incomplete, or config.json is another model's"
            )
        for name, origin in self.origins.items():
            counts = Counter(origin.patterns)
            if len(set(counts.values())) > 1:
                label = getattr(self.source, "label", "the checkpoint")
                found = ", ".join(f"{count} of {pattern}" for pattern, count in counts.items())
                raise MissingWeight(f"{label}: {name} is made of as many tensors of each kind, it has {found}")

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    def prefix_of_layer(self, index: int) -> str:
        return f"{self.model.base_model_prefix}.{self.layers_name}.{index}"

    def prefix_of(self, module: nn.Module) -> str:
        """The dotted name of a submodule within the model."""
        return next(name for name, found in self.model.named_modules() if found is module)

    @property
    def norm(self) -> nn.Module:
        return getattr(self.base, self.norm_name)

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    # ---- weights --------------------------------------------------------------------------------------------------

    def load_parameter(self, name: str, source: WeightSource | None = None) -> Tensor:
        """The value of one parameter (its full name in the transformers model) in the compute dtype, on the device.

        Padded formats are cut to the parameter's shape. Raises MismatchError where the shapes do not fit.
        """
        source = source or self.source
        origin = self.origins[name]
        wanted = self._shapes[name]
        if origin.converter is None:
            return self._fit(source, origin.tensors[0], source.load(origin.tensors[0], device=self.device), wanted)
        return self._convert(name, list(zip(origin.tensors, origin.patterns, strict=True)), wanted, source)

    def _convert(
        self, name: str, tensors: list[tuple[str, str | None]], wanted: tuple[int, ...], source: WeightSource
    ) -> Tensor:
        """A parameter that transformers makes of several checkpoint tensors, or what some of them make of it."""
        converter = copy.deepcopy(self.origins[name].converter)
        for tensor, pattern in tensors:
            value = source.load(tensor, device=self.device).to(self.dtype)
            converter.add_tensor(name, tensor, pattern, value)
        try:
            made = converter.convert(name, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError) as error:
            label = getattr(source, "label", "the checkpoint")
            raise MismatchError(
                f"{label}: the {len(tensors)} tensors that make {name}, first {tensors[0][0]}, do not fit "
                f"together: {error}"
            ) from error
        value = made[name]
        value = value[0] if isinstance(value, list) else value
        return self._fit(source, name, value, wanted)

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
                    found[split_name(tensor)[0]] = (name, seen[pattern])
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

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.model.named_parameters(remove_duplicate=False)}

    def _fit(self, source: WeightSource, name: str, value: Tensor, wanted: tuple[int, ...]) -> Tensor:
        if tuple(value.shape) != wanted:
            stored = source.modules.get(split_name(name)[0])
            padded = stored is not None and stored.format in ("exl2", "exl3")
            if not padded or value.dim() != len(wanted) or any(h < w for h, w in zip(value.shape, wanted, strict=True)):
                label = getattr(source, "label", "the checkpoint")
                raise MismatchError(
                    f"{label}: {name} is {list(value.shape)}, the model of its config.json wants {list(wanted)}"
                )
            value = value[tuple(slice(0, size) for size in wanted)]
        return value.to(self.dtype)

    def load(self, module: nn.Module, prefix: str, source: WeightSource | None = None) -> None:
        """Give every parameter below `module` (at `prefix`) its value."""
        self.loaded_from = getattr(source or self.source, "label", "") or "the model"
        for name, _ in list(module.named_parameters()):
            self.set_parameter(module, name, self.load_parameter(f"{prefix}.{name}", source))

    def unload(self, module: nn.Module) -> None:
        """Send every parameter below `module` back to the meta device."""
        for name, value in list(module.named_parameters()):
            self.set_parameter(module, name, value.detach().to("meta"))
        release_free_memory(self.device)

    @staticmethod
    def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
        owner, leaf = split_name(name)
        target = module.get_submodule(owner) if owner else module
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

    @contextmanager
    def layer(self, index: int, source: WeightSource | None = None) -> Iterator[nn.Module]:
        with self.loaded(self.layers[index], self.prefix_of_layer(index), source) as layer:
            yield layer

    def modules_of_layer(self, index: int) -> list[str]:
        """Checkpoint modules whose tensors make up this layer, in the order of its parameters."""
        prefix = self.prefix_of_layer(index) + "."
        found: dict[str, None] = {}
        for name, origin in self.origins.items():
            if name.startswith(prefix):
                for tensor in origin.tensors:
                    found[split_name(tensor)[0]] = None
        return list(found)

    def parameters_of(self, module: str) -> list[str]:
        """Names of the parameters that the checkpoint module `module` takes part in."""
        return [n for n, origin in self.origins.items() if any(split_name(t)[0] == module for t in origin.tensors)]

    def is_head(self, module: str) -> bool:
        """Whether the output head is made of the checkpoint module `module`: it is the head, or an embedding tied to
        it."""
        return role_of(module) == "head" or f"{self.prefix_of(self.head)}.weight" in self.parameters_of(module)

    # ---- running --------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, batch: int, source: WeightSource | None = None) -> Iterator[Tensor]:
        """What enters the first layer, a batch of rows at a time; ids [rows, tokens] -> [batch, tokens, hidden].

        Records the arguments of every layer's call for this row length. Raises NotFiniteError.
        """
        embedding = self.embedding
        self.calls.pop(ids.shape[1], None)
        with self.loaded(embedding, self.prefix_of(embedding), source):
            self.record(ids[:1])
            for number, rows in enumerate(ids.split(batch)):
                first = self._run_recorders(rows)[0].calls[0][0]
                self.watch.see(first, self.loaded_from, "the embedding", number * batch, embedding)
                yield first

    def record(self, ids: Tensor) -> None:
        """Note every layer's call arguments for rows of this length. The embedding must be loaded."""
        recorders = self._run_recorders(ids[:1])
        calls = []
        for index, recorder in enumerate(recorders):
            if len(recorder.calls) != 1:
                raise UnsupportedError(
                    f"{type(self.base).__name__} calls layer {index} {len(recorder.calls)} times in one pass; "
                    f"only models that run each layer once can be streamed"
                )
            _, args, kwargs = recorder.calls[0]
            calls.append((args, {key: value for key, value in kwargs.items() if key != "past_key_values"}))
        self.calls[ids.shape[1]] = calls

    def _run_recorders(self, ids: Tensor) -> list[_Recorder]:
        recorders = [_Recorder(layer) for layer in self.layers]
        norm = self.norm
        setattr(self.base, self.layers_name, nn.ModuleList(recorders))
        setattr(self.base, self.norm_name, nn.Identity())
        try:
            self.base(input_ids=ids.to(self.device), use_cache=False)
        finally:
            setattr(self.base, self.layers_name, self.layers)
            setattr(self.base, self.norm_name, norm)
        return recorders

    def run_layer(self, index: int, hidden: Tensor, first_row: int = 0) -> Tensor:
        """Replay one loaded layer; hidden [batch, tokens, hidden], any batch, a row length that was recorded.

        first_row: what messages call the batch's first row. Raises NotFiniteError; on a device, where nobody waits for
        every state, at the end of the block that loaded the layer, or before logits are made.
        """
        args, kwargs = self.calls[hidden.shape[1]][index]
        out = self.layers[index](hidden, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        self.watch.see(out, self.loaded_from, f"layer {index}", first_row, self.layers[index])
        return out

    def logits(self, normed: Tensor, first_row: int | None = None) -> Tensor:
        """Logits [batch, tokens, vocab] of post-norm hidden states; the head must be loaded. Soft caps and logit scales
        of the architecture are applied, as its own forward does. Raises NotFiniteError for states that are not finite.
        """
        self.watch.see(normed, self.loaded_from, "the final norm", first_row, self.norm)
        prefix = self.model.base_model_prefix
        setattr(self.model, prefix, _Passthrough(normed))
        try:
            return self.model(input_ids=None, use_cache=False).logits
        finally:
            setattr(self.model, prefix, self.base)

    @contextmanager
    def head_loaded(self, source: WeightSource | None = None) -> Iterator[nn.Module]:
        with self.loaded(self.head, self.prefix_of(self.head), source) as head:
            yield head

    @contextmanager
    def norm_loaded(self, source: WeightSource | None = None) -> Iterator[nn.Module]:
        with self.loaded(self.norm, self.prefix_of(self.norm), source) as norm:
            yield norm

    def head_is_linear(self, normed: Tensor) -> bool:
        """Whether logits are exactly `head(hidden)`, with no soft cap or scale after it. The head must be loaded."""
        head = self.head
        return isinstance(head, nn.Linear) and torch.equal(self.logits(normed), head(normed))


@dataclass(frozen=True)
class LinearWeight:
    """What one weight handed to `torch.nn.functional.linear` is: [out, in], or one expert's slice of a 3-D parameter.

    modules: the checkpoint modules whose rows make it up, one after another along `out`
    parameter: its full name in the model; expert: the slice, None for a 2-D parameter
    """

    modules: tuple[str, ...]
    parameter: str
    expert: int | None = None


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
            origin = model.origins[full]
            modules = [split_name(tensor)[0] for tensor in origin.tensors]
            if parameter.dim() == 2 and name.endswith("weight"):
                self._whole[parameter.data_ptr()] = LinearWeight(tuple(modules), full)
            elif parameter.dim() == 3 and origin.converter is not None and len(modules) % len(parameter) == 0:
                by_pattern: dict[str | None, list[str]] = {}  # a fused parameter lists them pattern by pattern
                for module, pattern in zip(modules, origin.patterns, strict=True):
                    by_pattern.setdefault(pattern, []).append(module)
                experts = [
                    LinearWeight(tuple(found[e] for found in by_pattern.values()), full, e)
                    for e in range(len(parameter))
                ]
                self._slices[parameter.data_ptr()] = (parameter[0].numel() * parameter.element_size(), experts)

    def __iter__(self) -> Iterator[LinearWeight]:
        yield from self._whole.values()
        for _, experts in self._slices.values():
            yield from experts

    def find(self, weight: Tensor) -> LinearWeight | None:
        address = weight.data_ptr()
        if address in self._whole:
            return self._whole[address]
        for start, (stride, experts) in self._slices.items():
            if start <= address < start + stride * len(experts) and weight.dim() == 2:
                return experts[(address - start) // stride]
        return None


def _skeleton(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model_config = transformers_config(config)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)  # sdpa where it can, as from_pretrained
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UnsupportedError(f"transformers cannot build a causal model from config.json: {error}") from error
    finally:
        logger.setLevel(level)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The transformers config object of a config.json, without its quantization.

    Raises CheckpointError if `model_type` is missing or unknown."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"config.json: model_type {model_type!r} is not one that this transformers knows")
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        return CONFIG_MAPPING[model_type].from_dict(kept)
    except Exception as error:  # its validators raise classes of their own, which derive from nothing narrower
        raise CheckpointError(f"config.json: not a valid {model_type} config: {error}") from error


def _find_layers(base: nn.Module, config: Mapping[str, Any]) -> tuple[str, nn.ModuleList]:
    lists = {name: found for name, found in base.named_children() if isinstance(found, nn.ModuleList) and len(found)}
    for name in ("layers", "h", "blocks"):
        if name in lists:
            return name, lists[name]
    raise UnsupportedError(f"{type(base).__name__} has no stack of layers that can be streamed; it has {list(lists)}")


def _origins(model: Any, source: WeightSource) -> dict[str, _Origin]:
    """For every parameter of the model, the checkpoint tensors that make it, by transformers' own name mapping."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    collected: dict[str, list[tuple[str, str | None]]] = {}
    for tensor in sorted(dense_names(source), key=dot_natural_key):
        renamed, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and tensor in state:
            renamed, pattern = tensor, None
        if renamed in state:
            collected.setdefault(renamed, []).append((tensor, pattern))
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    origins = {}
    for name, found in collected.items():
        tensors, patterns = zip(*found, strict=True)
        converter = by_pattern[patterns[0]] if patterns[0] is not None else None
        origins[name] = _Origin(tensors, patterns, converter)
    for name, same_as in tied.items():
        if name not in origins and same_as in origins:
            origins[name] = origins[same_as]
        elif same_as not in origins and name in origins:
            origins[same_as] = origins[name]
    return origins


def dense_names(source: WeightSource) -> list[str]:
    """Names of all dense values that a source can give: `<module>.weight` for quantized modules, else the tensors."""
    names = []
    for module in source.modules.values():
        if module.is_quantized:
            names.append(module.dense_name)
            names += [f"{module.name}.bias"] if "bias" in module.parts else []
        else:
            names += [info.name for info in module.parts.values()]
    return names


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
