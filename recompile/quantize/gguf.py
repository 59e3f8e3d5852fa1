"""A dense model -> GGUF files, one for each type or preset, tensor by tensor.

The base is a Hugging Face directory (then the tokenizer's keys come from a GGUF file of the same model) or a GGUF file.
Every tensor is loaded once, brought into GGUF's order and convention, encoded for every variant and appended to its
file. Memory is bounded by one tensor. What a tensor really got, where a type does not fit it, is in the report.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, read_json, split_name
from recompile.errors import CheckpointError, FormatError, MismatchError, OutputError, UnsupportedError
from recompile.formats.gguf_encode import ENCODABLE, resolve
from recompile.formats.gguf_types import FILE_TYPES, TYPES, GgufType, find_type
from recompile.gguf.container import SPLIT_KEYS, GgufFile, Layout, NewTensor, encode_key, lay_out
from recompile.gguf.imatrix import Imatrix, InputSums
from recompile.gguf.keys import gemma4_rope_factors, heads_in, llama3_factors, model_records, tokenizer_records
from recompile.gguf.names import (
    Architecture,
    Heads,
    Place,
    architecture_for,
    architecture_in,
    places_of,
    row_order,
    steps_of,
    text_config_of,
    text_name,
    unnamed,
)
from recompile.gguf.values import split_one
from recompile.merge.write_gguf import PROVENANCE, QUANTIZATION_VERSION
from recompile.model.decoded import as_dense
from recompile.model.roles import roles_of
from recompile.model.used_rows import UsedRows
from recompile.quantize.calibrate import InputPower, stream_inputs
from recompile.quantize.gguf_compensated import place_in_layer
from recompile.quantize.gguf_rounding import Feedback, layer_of

BUILDING_SUFFIX = ".building"
BATCH_TOKENS = 2048
# Never quantized; GGUF keeps them as float32, whatever the architecture (llama.cpp's quantizer passes over the same).
F32_LEAVES = (
    "norm",
    "ffn_gate_inp",
    "ssm_conv1d",
    "shortconv.conv",
    "per_layer_model_proj",
    "altup_proj",
    "altup_unembd_proj",
    "attn_rel_b",
    "position_embd",
    "token_types",
    "time_mix_first",
    "time_mix_w1",
    "time_mix_w2",
    "time_mix_decay_w1",
    "time_mix_decay_w2",
    "time_mix_lerp_fused",
)
VOCABULARY = ("token_embd.weight", "output.weight")  # with a row for every token
MOST_PADDING = 256  # rows of them beyond the last token; Gemma 3 has 64
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # of the config, in truth


# ---- what to make ----------------------------------------------------------------------------------------------------


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that presets named M give more: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Preset:
    """Which type each tensor is asked to be.

    default: of all weights of the layers
    head:    of the output head, and of the embedding where it is the head as well
    rules:   leaf in GGUF -> (type, layers it holds for: "all", "more", "first 2" ...)
    """

    name: str
    default: str
    head: str
    rules: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    file_type: int | None = None

    def wanted(self, name: str, layers: int, tied: bool) -> str:
        """The type that tensor `name` is asked to be."""
        if name == "output.weight" or (name == "token_embd.weight" and tied):
            return self.head
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            return self.default
        layer = int(match[1])
        for kind, where in self.rules.get(match[2].removesuffix("_exps"), ()):
            if _holds(where, layer, layers):
                return kind
        return self.default


@dataclass(frozen=True)
class Mix:
    """The types that a recipe gives to every tensor, in the place of a preset.

    name:  of the file
    kinds: GGUF tensor -> type asked for, of all tensors that are not plain
    """

    name: str
    kinds: Mapping[str, str] = field(repr=False)
    file_type: int | None = None

    def wanted(self, name: str, layers: int, tied: bool) -> str:
        return self.kinds[name]


def _holds(where: str, layer: int, layers: int) -> bool:
    if where == "all":
        return True
    if where == "more":
        return _more_bits(layer, layers)
    kind, _, number = where.partition(" ")  # "first 2": layers; "share 8": an eighth of them
    return layer < (int(number) if kind == "first" else layers // int(number))


PRESETS: dict[str, Preset] = {
    row.name: row
    for row in (
        Preset("Q2_K_S", "Q2_K", "Q6_K", {"attn_v": (("Q4_K", "all"),), "ffn_down": (("Q4_K", "share 8"),)}, 21),
        Preset("Q3_K_S", "Q3_K", "Q6_K", {}, 11),
        Preset(
            "Q3_K_M",
            "Q3_K",
            "Q6_K",
            {
                "attn_v": (("Q5_K", "first 2"), ("Q4_K", "all")),
                "ffn_down": (("Q5_K", "share 16"), ("Q4_K", "more")),
                "attn_output": (("Q4_K", "all"),),
            },
            12,
        ),
        Preset("Q3_K_L", "Q3_K", "Q6_K", dict.fromkeys(("attn_v", "ffn_down", "attn_output"), (("Q5_K", "all"),)), 13),
        Preset("Q4_K_S", "Q4_K", "Q6_K", {"attn_v": (("Q5_K", "first 4"),), "ffn_down": (("Q5_K", "share 8"),)}, 14),
        Preset("Q4_K_M", "Q4_K", "Q6_K", dict.fromkeys(("attn_v", "ffn_down"), (("Q6_K", "more"),)), 15),
        Preset("Q5_K_S", "Q5_K", "Q6_K", {}, 16),
        Preset("Q5_K_M", "Q5_K", "Q6_K", dict.fromkeys(("attn_v", "ffn_down"), (("Q6_K", "more"),)), 17),
    )
}
LARGE_HEADS = ("Q8_0", "BF16", "F16", "F32")  # such a head stays of the type itself


def find_preset(name: str) -> Preset:
    """A preset (Q4_K_M) or a plain type (Q4_K: every weight of the layers, the head Q6_K). Raises FormatError."""
    if name.upper() in PRESETS:
        return PRESETS[name.upper()]
    kind = find_type(name)
    head = kind.name if kind.name in LARGE_HEADS else "Q6_K"
    return Preset(kind.name, kind.name, head, file_type=FILE_TYPES.get(kind.name))


# ---- importance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs of modules, by Hugging Face module name: float32 [in] each; tokens: how many were seen."""

    values: Mapping[str, Tensor] = field(repr=False)
    tokens: Mapping[str, int] = field(default_factory=dict, repr=False)
    source: str = "none"


@dataclass(frozen=True)
class Calibrated:
    """So many layers are calibrated."""

    done: int
    total: int


def collect_importance(
    base: Checkpoint,
    ids: Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    source: str = "",
    counted: Tensor | None = None,
) -> Iterator[Calibrated | Importance]:
    """One pass of calibration rows (int64 [rows, tokens]) over the layers; yields a Calibrated a layer and last the
    Importance, of the places that count (bool [rows, tokens]; None: all)."""
    values: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for inputs in stream_inputs(base, ids, InputPower, device=device, dtype=dtype, counted=counted):
        for group in inputs.groups:
            if group.hessian is not None:
                values |= dict.fromkeys(group.modules, (group.hessian / group.tokens).cpu())
                tokens |= dict.fromkeys(group.modules, group.tokens)
        if inputs.layer is not None:
            yield Calibrated(inputs.layer + 1, inputs.depth)
    yield Importance(values, tokens, source)


def importance_from(imatrix: Imatrix, tensors: Sequence[BaseTensor], source: str) -> Importance:
    """What an imatrix file says of these tensors: a column's importance is its summed squares over the tokens seen.

    Raises MismatchError for sums of another width or another number of experts."""
    values: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for tensor in tensors:
        sums = imatrix.entries.get(tensor.name)
        if sums is None or tensor.plain:
            continue
        rows = tensor.modules
        if sums.sum_squares.shape != (len(rows), tensor.ne[0]):
            raise MismatchError(
                f"{source}: {tensor.name} has sums {list(sums.sum_squares.shape)}, wanted "
                f"{[len(rows), tensor.ne[0]]}; it is of another model"
            )
        for number, modules in enumerate(rows):
            count = float(sums.counts[number])
            for module in modules if count > 0 else ():
                values[module] = torch.from_numpy(sums.sum_squares[number] / count)
                tokens[module] = int(count)
    return Importance(values, tokens, source)


def imatrix_of(importance: Importance, tensors: Sequence[BaseTensor], row_tokens: int) -> Imatrix:
    """The same as an imatrix file holds it, for llama-quantize and others. row_tokens: length of a calibration row."""
    entries = {}
    for tensor in tensors:
        modules = [names[0] for names in tensor.modules]
        if tensor.plain or not any(module in importance.values for module in modules):
            continue
        counts = torch.tensor([float(importance.tokens.get(module, 0)) for module in modules])
        empty = torch.zeros(tensor.ne[0])
        means = torch.stack([importance.values.get(module, empty).float() for module in modules])
        entries[tensor.name] = InputSums((means * counts[:, None]).numpy(), counts.numpy())
    most = max(importance.tokens.values(), default=0)
    return Imatrix(entries, max(1, most // row_tokens), row_tokens, (importance.source or "unknown",))


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseTensor:
    """One tensor as GGUF has it and the Hugging Face tensors that make it: one, or one an expert."""

    name: str
    ne: tuple[int, ...]
    sources: tuple[str, ...]
    place: Place
    plain: bool  # stays float32: a vector, a norm, a router
    seen: tuple[str, ...]  # the names that recipes, profiles and importance have: of fused experts those of each one

    @property
    def module(self) -> str:
        return split_name(self.seen[0])[0]

    @property
    def modules(self) -> list[tuple[str, ...]]:
        """The modules that read one input, one entry a row of an importance matrix: one, or one an expert."""
        count = self.ne[-1] if self.place.stacked else len(self.sources)
        share = len(self.seen) // count
        names = [split_name(name)[0] for name in self.seen]
        return [tuple(names[start : start + share]) for start in range(0, share * count, share)]


@dataclass(frozen=True)
class Made:
    """What one tensor of one variant became."""

    tensor: str
    asked: str
    got: str
    weights: int
    size_bytes: int
    relative_error: float  # |W - Wq| / |W|, Frobenius
    note: str = ""
    rounding: str = ""  # how its codes were chosen; empty: each by itself

    @property
    def bits(self) -> float:
        return 8 * self.size_bytes / max(1, self.weights)


@dataclass(frozen=True)
class Variant:
    """One GGUF file to be made: its types by tensor and its layout."""

    preset: Preset | Mix
    path: Path
    kinds: tuple[GgufType, ...]
    layout: Layout = field(repr=False)


def journal_path(variants: Sequence[Variant]) -> Path:
    """Where a build that is under way says what it has made."""
    return variants[0].path.with_name(f"{variants[0].path.stem}{BUILDING_SUFFIX}.jsonl")


@dataclass(frozen=True)
class VariantPlan:
    """Everything that `build_variants` will do."""

    base: Checkpoint
    tensors: tuple[BaseTensor, ...]
    variants: tuple[Variant, ...]
    importance: Importance | None
    extra: Mapping[str, Tensor]  # tensors that follow from the config: rope factors
    layers: int  # that presets count
    left_out: tuple[str, ...] = ()  # tensors of towers and draft heads, which are files of their own for the engine
    feedback: Feedback | None = None  # for codes that make up for each other's errors

    @property
    def is_calibrated(self) -> bool:
        return self.importance is not None or (self.feedback is not None and self.feedback.gives_importance)

    def importance_of(self, module: str, tensor: BaseTensor) -> Tensor | None:
        """What errors of a module are weighed by, float32 [in]; None where all columns count the same."""
        if tensor.plain or (tensor.place.fused is not None and tensor.place.fused.how == "kv_b"):
            return None  # keys and values of a latent are multiplied the other way round
        if self.importance is not None:
            found = self.importance.values.get(module)
        elif self.feedback is not None and self.feedback.gives_importance:
            found = self.feedback.inputs.mean_squares_of(module, layer_of(tensor.name))
        else:
            return None
        return None if found is None or found.shape != (tensor.ne[0],) or not bool(found.any()) else found

    @property
    def order(self) -> list[int]:
        """Numbers of tensors as they are made: with feedback an embedding last, for it may be the head; where errors
        are compensated those of a layer as it calls them, and an embedding that is not the head before all."""
        numbers, names = range(len(self.tensors)), [tensor.name for tensor in self.tensors]
        if self.feedback is None:
            return list(numbers)
        if not self.feedback.compensates:
            return sorted(numbers, key=lambda n: names[n] == VOCABULARY[0])

        def place(n: int) -> tuple[int, int, bool]:
            layer = layer_of(names[n])
            if layer is not None:
                return (layer, *place_in_layer(names[n]))
            is_first = names[n] == VOCABULARY[0] and VOCABULARY[1] in names
            return (-1 if is_first else self.layers + len(names), names[n] == VOCABULARY[0], False)

        return sorted(numbers, key=place)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the output, for the journal of an interrupted run."""
        digest = hashlib.sha256()
        if self.importance is not None:
            for name in sorted(self.importance.values):
                digest.update(name.encode() + self.importance.values[name].float().numpy().tobytes())
        collected = self.feedback is not None and self.feedback.gives_importance
        return {
            "base": self.base.identity,
            "importance": "of the inputs that rounding weighs errors by" if collected else digest.hexdigest(),
            **({} if self.feedback is None else {"rounding": self.feedback.key}),
            "headers": [hashlib.sha256(variant.layout.header).hexdigest() for variant in self.variants],
        }


@dataclass(frozen=True)
class TensorDone:
    """A tensor is written to every file."""

    tensor: str
    done_bytes: int  # of the base's weights as float32
    total_bytes: int


@dataclass(frozen=True)
class VariantsReport:
    """The files and what each tensor became; `noted` are the tensors that did not get what was asked for."""

    files: tuple[str, ...]
    tensors: Mapping[str, tuple[Made, ...]]  # by preset
    left_out: tuple[str, ...] = ()  # tensors of the base that are in no file: towers, draft heads
    rows: UsedRows | None = None  # that it was calibrated on; None: on none here

    def noted(self, preset: str) -> list[Made]:
        return [made for made in self.tensors[preset] if made.note]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_variants(
    base: Checkpoint,
    out_dir: Path,
    names: Sequence[str | Mix],
    *,
    stem: str | None = None,
    tokenizer_from: GgufFile | None = None,
    importance: Importance | None = None,
    provenance: Mapping[str, str] | None = None,
) -> VariantPlan:
    """Decide every tensor of every file; reads headers and configs only.

    names: presets or types; stem: file names are STEM-PRESET.gguf, default the base's name. A Mix has a file name of
    its own; provenance: keys that go into every file, without their prefix

    Raises FormatError (an unknown or doubled type), UnsupportedError (an architecture without names, an EXL build),
    CheckpointError (no tokenizer keys), MismatchError (another model's tokenizer), OutputError (a file exists).
    """
    base = as_dense(base, to_gguf=True)
    plain = [name.upper() for name in names if isinstance(name, str)]
    if len(set(plain)) != len(plain):
        raise FormatError("{bits}: a type is given twice")
    records, rows = _head_records(base, tokenizer_from)
    tensors = base_tensors(base)
    if rows is not None:
        tensors = [replace(t, ne=(t.ne[0], rows)) if t.name in VOCABULARY else t for t in tensors]
    extra = _extra_tensors(base)
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    layers = layers_of(base, tensors)
    variants = []
    for name in names:
        preset = find_preset(name) if isinstance(name, str) else name
        kinds = _types_of(preset, tensors, layers, tied) + (TYPES["F32"],) * len(extra)
        head = dict(records)
        if preset.file_type is not None:
            head["general.file_type"] = encode_key("general.file_type", preset.file_type, "u32")
        head["general.quantization_version"] = encode_key("general.quantization_version", QUANTIZATION_VERSION, "u32")
        for key, value in (provenance or {}).items():
            head[f"{PROVENANCE}{key}"] = encode_key(f"{PROVENANCE}{key}", value)
        new = [NewTensor(t.name, kind, t.ne) for t, kind in zip(tensors, kinds, strict=False)]
        new += [NewTensor(key, TYPES["F32"], (len(value),)) for key, value in extra.items()]
        if isinstance(preset, Mix):
            path = out_dir / preset.name
        else:
            path = out_dir / f"{stem or base.path.resolve().name.removesuffix('.gguf')}-{preset.name}.gguf"
        variants.append(Variant(preset, path, kinds, lay_out(head.values(), new)))
    made = next((variant.path for variant in variants if variant.path.exists()), None)
    if made is not None and not journal_path(variants).exists():  # else a run that was killed at its end goes on
        raise OutputError(f"{made}: exists; remove it or choose another {{out}}")
    left = tuple(left_out(base))
    return VariantPlan(base.whole, tuple(tensors), tuple(variants), importance, extra, layers, left)


def _head_records(base: Checkpoint, tokenizer_from: GgufFile | None) -> tuple[dict[str, bytes], int | None]:
    """The keys of every file, encoded: the model's and its tokenizer's; and how many rows its vocabulary has in them,
    None where that is what the base's tensors say."""
    if isinstance(base, GgufCheckpoint):
        kept = base.file.records((*SPLIT_KEYS, "general.file_type", "general.quantization_version"))
        return {name: record for name, record in kept.items() if not name.startswith(PROVENANCE)}, None
    architecture = gguf_architecture(base)
    assert architecture is not None, "only of a GGUF file may it be unknown"
    if tokenizer_from is None:
        raise CheckpointError(
            f"{base.label}: a GGUF file holds its tokenizer; give a GGUF file of the same model with {{tokenizer_from}}"
        )
    rows = _rows_of_vocabulary(architecture, base, tokenizer_from)
    config = {**_stored_config(base), "vocab_size": rows}
    records = model_records(architecture, config, base.path.resolve().name)
    return records | tokenizer_records(tokenizer_from), rows


def _types_of(preset: Preset | Mix, tensors: Sequence[BaseTensor], layers: int, tied: bool) -> tuple[GgufType, ...]:
    """The type of every tensor. Raises UnsupportedError for one that nothing here encodes."""
    kinds = tuple(
        TYPES["F32"] if tensor.plain else resolve(preset.wanted(tensor.name, layers, tied), tensor.ne[0])
        for tensor in tensors
    )
    opaque = next((kind for kind in kinds if kind.name not in ENCODABLE), None)
    if opaque is not None:
        raise UnsupportedError(
            f"{opaque.name}: has no encoder here; a tensor of this type can only be merged from a file that has it"
        )
    return kinds


def _rows_of_vocabulary(architecture: Architecture, base: Checkpoint, tokenizer_from: GgufFile) -> int:
    """How many rows the embedding and the head have in the file: one a token.

    Raises MismatchError for another vocabulary than the base's, but for rows beyond the last token where conversion
    leaves them out."""
    tokens = len(tokenizer_from.value("tokenizer.ggml.tokens"))
    vocab = text_config_of(base.config).get("vocab_size")
    padding = vocab - tokens if isinstance(vocab, int) and architecture.cuts_vocabulary else 0
    if tokens != vocab and not 0 < padding <= MOST_PADDING:
        raise MismatchError(
            f"{tokenizer_from.label}: has {tokens} tokens, {base.label} has a vocabulary of {vocab}; give a GGUF "
            f"file of the same model"
        )
    return tokens


def rows_in_file(base: Checkpoint) -> int | None:
    """How many rows of its vocabulary a Hugging Face base has in a GGUF file, where conversion leaves out those beyond
    the tokenizer's last token; None where it leaves out none, or no tokenizer.json says how many tokens there are."""
    path = base.path / "tokenizer.json"
    vocab = text_config_of(base.config).get("vocab_size")
    if isinstance(base, GgufCheckpoint) or not architecture_for(base.config).cuts_vocabulary:
        return None
    if not path.is_file() or not isinstance(vocab, int):
        return None
    content = read_json(path)
    model = content.get("model", {}).get("vocab", {})
    ids = [*(model.values() if isinstance(model, dict) else range(len(model)))]
    ids += [added["id"] for added in content.get("added_tokens") or ()]
    tokens = max(ids, default=-1) + 1
    return tokens if 0 < vocab - tokens <= MOST_PADDING else None


def _stored_config(base: Checkpoint) -> Mapping[str, Any]:
    """The text model's config, with as many draft layers as the checkpoint holds: transformers saves none."""
    config = dict(text_config_of(base.config))
    first = int(config.get("num_hidden_layers") or 0)
    drafts = {int(match[1]) for name in base.tensors if (match := re.search(r"\.layers\.(\d+)\.", name))}
    config["num_nextn_predict_layers"] = len([number for number in drafts if number >= first])
    return config


def gguf_architecture(base: Checkpoint) -> Architecture | None:
    """The architecture of a base; None for a GGUF file of one without a table of names, whose tensors keep theirs.

    Raises UnsupportedError for a Hugging Face model of a type that has no row in the table."""
    if isinstance(base, GgufCheckpoint):
        return architecture_in(base.file.value("general.architecture"), base.file.tensors)
    return architecture_for(base.config)


def left_out(base: Checkpoint) -> list[str]:
    """The tensors of a Hugging Face checkpoint that a GGUF file of its text model does not hold."""
    if isinstance(base, GgufCheckpoint):
        return []
    towers = _towers(base)
    return [name for name in base.tensors if text_name(name) is None or name in towers]


def _towers(base: Checkpoint) -> frozenset[str]:
    """The tensors of a multimodal checkpoint beside its text model, whatever they are called."""
    if not isinstance(base.config.get("text_config"), Mapping):
        return frozenset()
    beside = [base.modules[name] for name, role in roles_of(base).items() if role.part == "tower"]
    return frozenset(info.name for module in beside for info in module.parts.values())


def layers_of(base: Checkpoint, tensors: Iterable[BaseTensor]) -> int:
    """How many layers presets count: those of the config, or those that a GGUF file of any architecture has."""
    known = text_config_of(base.config).get("num_hidden_layers")
    found = [int(match[1]) for tensor in tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))]
    return int(known) if known is not None else max(found, default=-1) + 1


def _extra_tensors(base: Checkpoint) -> dict[str, Tensor]:
    """Factors of rotary frequencies: as a GGUF base stores them, or as a config says."""
    if isinstance(base, GgufCheckpoint):
        return {name: base.load(name).float() for name in ROPE_TENSORS if name in base.tensors}
    config = text_config_of(base.config)
    factors = gemma4_rope_factors(config) if config.get("model_type") == "gemma4_text" else llama3_factors(config)
    return {} if factors is None else {"rope_freqs.weight": torch.tensor(factors)}


def base_tensors(base: Checkpoint) -> list[BaseTensor]:
    """The tensors of a GGUF file of this model, in a fixed order: embedding, layers, norm, head.

    Raises UnsupportedError and FormatError for a Hugging Face model without names in GGUF."""
    split, base = base, base.whole  # GGUF keeps fused experts fused
    architecture = gguf_architecture(base)
    if isinstance(base, GgufCheckpoint):
        return _stored_tensors(base)
    assert architecture is not None, "only of a GGUF file may it be unknown"
    config = text_config_of(base.config)
    heads = heads_in(config)
    found: dict[str, list[tuple[int, str, Place]]] = {}
    left = set(left_out(base))
    unknown, _ = unnamed(architecture, [name for name in base.tensors if name not in left], heads)
    if unknown:
        raise FormatError(
            f"{base.label}: {len(unknown)} tensors have no name in GGUF's {architecture.name}, first {unknown[0]}; "
            f"convert with llama.cpp's own converter"
        )
    tied = base.config.get("tie_word_embeddings")
    for name in base.tensors:
        plain = text_name(name) if name not in left else None
        for place in places_of(architecture, plain, heads) if plain is not None else ():
            if place.gguf != "output.weight" or not tied:  # some checkpoints store the tied head once more
                found.setdefault(place.gguf, []).append((-1 if place.expert is None else place.expert, name, place))
    tensors = []
    for gguf in sorted(found, key=_order):
        pieces = sorted(found[gguf], key=lambda piece: piece[0])
        experts = (len(pieces),) if pieces[0][0] >= 0 else ()
        if experts and [piece[0] for piece in pieces] != list(range(len(pieces))):
            raise CheckpointError(
                f"{base.label}: experts of {gguf} are missing; found {[piece[0] for piece in pieces]}"
            )
        place = pieces[0][2]
        shape = (*experts, *_gguf_shape(base.tensors[pieces[0][1]].shape, place, heads))
        ne = tuple(reversed(shape))
        sources = tuple(piece[1] for piece in pieces)
        seen = _expert_by_expert(split, sources, place)
        tensors.append(BaseTensor(gguf, ne, sources, place, is_plain(gguf, shape), seen))
    return tensors


def _expert_by_expert(base: Checkpoint, sources: tuple[str, ...], place: Place) -> tuple[str, ...]:
    """The names under which a checkpoint that fuses experts is seen, of the part of a tensor that a place is."""
    names = base.fused.get(sources[0]) if place.fused is not None and place.stacked else None
    if names is None:
        return sources
    assert place.fused is not None, "asked before"
    each = len(names) // base.stored_tensors[sources[0]].shape[0]  # "gate" and "up" of every expert, or "down"
    share = each // len(place.fused.parts)
    first = place.part * share
    return tuple(name for start in range(0, len(names), each) for name in names[start + first : start + first + share])


def _stored_tensors(base: GgufCheckpoint) -> list[BaseTensor]:
    """Those of a GGUF base, whatever its architecture: as they are stored, no value is changed twice."""
    names: dict[str, list[str]] = {}
    for name in base.tensors:
        place = base.places.get(name)
        names.setdefault(place.gguf if place is not None else name, []).append(name)
    return [
        BaseTensor(
            gguf,
            info.ne,
            tuple(names[gguf]),
            base.places.get(names[gguf][0], Place(gguf)),
            is_plain(gguf, info.shape),
            tuple(names[gguf]),
        )
        for gguf in sorted(base.file.tensors, key=_order)
        if gguf not in ROPE_TENSORS and (info := base.file.tensors[gguf])
    ]


def is_plain(gguf: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays float32: a vector, a norm, a router, a convolution, or none of the engine's weights."""
    leaf = gguf.removesuffix(".weight")
    return len(shape) < 2 or min(shape) == 1 or not gguf.endswith(".weight") or leaf.endswith(F32_LEAVES)


def _gguf_shape(shape: tuple[int, ...], place: Place, heads: Heads) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor, or of the part of it that a place is, in GGUF."""
    return tuple(place_pieces(torch.empty(shape, device="meta"), place, heads, whole=True)[0].shape)


def _order(name: str) -> tuple[int, int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    if match:
        return (1, int(match[1]), name)
    return ({"token_embd.weight": 0}.get(name, 2), 0, name)


def place_pieces(value: Tensor, place: Place, heads: Heads, *, whole: bool = False) -> list[Tensor]:
    """A Hugging Face tensor of any shape, or the part of it that a place is, in GGUF's order and convention: in one
    piece, or one an expert where the tensor, [experts, ..., ...], holds all experts (`whole`: put together again)."""
    if place.fused is None:
        if place.heads:
            value = value[row_order(value.shape[0], place.heads, back=False)]
        value = value.float() + place.offset if place.offset else value  # 16 bits could not hold the sum
        pieces = [value]
    else:
        how, count = place.fused.how, len(place.fused.parts)
        each = value if place.stacked else [value]
        pieces = [split_one(how, one, place.part, count, heads) for one in each]
    for step in steps_of(place, heads):
        pieces = [step.to_gguf(piece) for piece in pieces]
    return [torch.stack(pieces)] if whole and place.stacked else pieces


def counts_of(made: Sequence[Made]) -> dict[str, int]:
    """Type -> tensors that got it, of those that are quantized."""
    return dict(Counter(entry.got for entry in made if TYPES[entry.got].is_quantized))
