"""Candidates made on the fly: a variant that is on no disk, each weight rounded when it is asked for.

A profile of such candidates says which mix to make before anything is quantized; `model_quantize -or` then makes just
that mix in one calibrated pass. A weight goes through the grids and the scale search of model_quantize (method "mse",
optionally with importance from calibration rows) without GPTQ, or through the encoder of a GGUF type or of EXL2, and is
decoded at once; EXL3 has stand-ins of the same error. Nothing is kept but encodings that several types fall back to, so
a run holds little more than the weights it asked for. Sizes are those of the stored form, to the bit. How each kind is
made is in `fake_quant`, `fake_quant_exl` and `fake_quant_mlx`.

Where candidates are to be rounded with error feedback, model_quantize makes them first, into a folder beside the
profile, and weights are read from there: what GPTQ takes off an error differs from module to module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import (
    Checkpoint,
    PartedCheckpoint,
    StoredModule,
    TensorInfo,
    open_checkpoint,
    split_name,
)
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_tensors
from recompile.costs import Profile, ProfileGroup, candidate_label, load_profile
from recompile.errors import CheckpointError, FormatError, OutputError, UnsupportedError
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.gguf.names import Heads, Joined
from recompile.io.files import was_made_here
from recompile.io.tensors import save_tensors
from recompile.model.decoded import as_dense
from recompile.recipe.recipe import SourceId

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recompile.quantize.encoders import IntEncoder
    from recompile.quantize.fake_quant import Maker, SharedEncodings

Spec = Mapping[str, Any]  # how a candidate is made, as a source of a recipe says it: {"bits": 4, "group_size": 32}
DEFAULTS: Mapping[str, Any] = {"group_size": 64, "symmetric": True}  # model_quantize's own


def parse_candidates(texts: Sequence[str]) -> list[str]:
    """`--candidates 2,3,4` or `2 3 4` -> ["2", "3", "4"]. Raises FormatError for an empty or a repeated one."""
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise FormatError("{candidates}: names no candidate; wanted bits, e.g. {candidates} 2,3,4,6")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FormatError(f"{{candidates}}: {twice} is given twice")
    return names


def exl_spec_of(name: str, format_name: str) -> tuple[SourceId, dict[str, Any]]:
    """The id and the spec of an EXL2 or EXL3 candidate: "2.5" -> (2.5, {"bits": 2.5, "format": "exl2"}).

    Raises FormatError for what is no number of bits."""
    if not re.fullmatch(r"\d+(\.\d+)?", name):
        raise FormatError(f"{{candidates}} {name}: {format_name} candidates are bits, such as 3 or 2.5")
    bits = float(name) if float(name) != int(float(name)) else int(float(name))
    return bits, {"bits": bits, "format": format_name}


def mlx_spec_of(name: str, group_size: int) -> tuple[SourceId, dict[str, Any]]:
    """The id and the spec of an MLX candidate: "4" -> (4, {"bits": 4, "format": "mlx"}), and "mxfp4" -> ("mxfp4",
    {"scheme": "mxfp4", "format": "mlx"}). Raises FormatError for any other name."""
    from recompile.formats.mlx_config import MODES

    if name in MODES and name != "affine":
        return name, {"scheme": name, "format": MLX}
    if not re.fullmatch(r"\d{1,9}", name):
        modes = ", ".join(mode for mode in MODES if mode != "affine")
        raise FormatError(f"{{candidates}} {name}: mlx candidates are whole bits, such as 3, or {modes}")
    size = {} if group_size == DEFAULTS["group_size"] else {"group_size": group_size}
    return int(name), {"bits": int(name), **size, "format": MLX}


def spec_of(name: str, **settings: Any) -> tuple[SourceId, dict[str, Any]]:
    """The id and the spec of a candidate as the user calls it: "4" -> (4, {"bits": 4}), "q4_k" -> ("Q4_K", {"type":
    "Q4_K"}), "nvfp4" -> ("nvfp4", {"scheme": "nvfp4"}). Settings are those of integers; the default ones are left out.
    mxfp4 and nvfp4 are both, told by their case: in capitals the GGUF type. Raises FormatError for a name that nothing
    here can make."""
    if re.fullmatch(r"\d+", name):
        bits = int(name)
        return bits, {"bits": bits, **{key: value for key, value in settings.items() if DEFAULTS[key] != value}}
    from recompile.formats.gguf_types import find_type
    from recompile.formats.schemes import parse_scheme

    reasons = []
    readers = (("type", find_type), ("scheme", parse_scheme))
    for kind, read in readers[::-1] if name.islower() and name.upper() in ("MXFP4", "NVFP4") else readers:
        try:
            found = read(name).name
        except FormatError as error:
            reasons.append(str(error))
            continue
        return found, {kind: found}
    raise FormatError(
        f"{{candidates}} {name}: wanted whole bits from 2 to 8, a GGUF type such as Q4_K, or a scheme such as "
        f"w4a16-g64; "
        f"{'; '.join(reasons)}"
    )


def maker_of(spec: Spec, literal: frozenset[str] = frozenset(), shared: SharedEncodings | None = None) -> Maker:
    """How a spec's variants are made. literal: of GGUF types, see GgufMaker; shared: of encoders that are slow.

    Raises FormatError for a spec that asks for what no format has, or has no encoder here."""
    from recompile.quantize.fake_quant import GgufMaker, IntMaker, SchemeMaker, SharedEncodings

    if spec.get("format") == MLX:
        from recompile.quantize.fake_quant_mlx import maker_for as mlx_maker_for

        return mlx_maker_for(spec, DEFAULTS["group_size"], shared if shared is not None else SharedEncodings())
    if "format" in spec:
        from recompile.quantize.fake_quant_exl import maker_for

        unknown = set(spec) - {"bits", "format"}
        if "bits" not in spec or unknown:
            raise FormatError(f"{dict(spec)}: wanted bits and format alone")
        return maker_for(str(spec["format"]), spec["bits"], shared if shared is not None else SharedEncodings())
    if "bits" in spec:
        return IntMaker(encoder_of(spec))
    kind = next(iter(spec), "")
    if len(spec) != 1 or kind not in ("type", "scheme"):
        raise FormatError(f"{dict(spec)}: wanted bits (and optionally {', '.join(DEFAULTS)}), a type or a scheme")
    if kind == "scheme":
        from recompile.formats.schemes import parse_scheme

        return SchemeMaker(parse_scheme(str(spec["scheme"])))
    from recompile.formats.gguf_encode import ENCODABLE
    from recompile.quantize.gguf import find_preset

    preset = find_preset(str(spec["type"]))
    if preset.default not in ENCODABLE:
        raise FormatError(f"{preset.name}: has no encoder here, it cannot be made; it can be merged from a file")
    return GgufMaker(preset.name, literal, shared if shared is not None else SharedEncodings())


def encoder_of(spec: Spec, method: str = "mse", importance: bool = True) -> IntEncoder:
    """The encoder of an integer candidate. Raises FormatError for what the format does not have."""
    from recompile.quantize.encoders import IntEncoder

    unknown = set(spec) - {"bits", *DEFAULTS}
    if "bits" not in spec or unknown:
        raise FormatError(f"{dict(spec)}: wanted bits, and optionally {', '.join(DEFAULTS)}")
    settings = {key: spec.get(key, value) for key, value in DEFAULTS.items()}
    return IntEncoder([spec["bits"]], settings["group_size"], settings["symmetric"], method, importance)


@dataclass(frozen=True)
class MadeVariant(Checkpoint):
    """A variant of `base` that implements Checkpoint. Make with `make_variant`."""

    base: Checkpoint | None = None
    spec: Spec = field(default_factory=dict)
    importance: Mapping[str, Tensor] | None = None  # module -> [in], mean square of every input
    maker: Maker | None = None
    forms: Mapping[str, str] = field(default_factory=dict)  # of the modules that are made
    fallbacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # module -> type asked for, type it gets
    copies: Mapping[str, str] = field(default_factory=dict)  # tensor -> the base's that it is one more copy of
    rounded: Checkpoint | None = None  # with error feedback: what it has quantized is not rounded here

    @property
    def joined(self) -> Mapping[str, Joined]:
        """The fused tensors that the base keeps in parts, as a GGUF file does."""
        return self.base.joined if isinstance(self.base, PartedCheckpoint) else {}

    @property
    def heads(self) -> Heads | None:
        return self.base.heads if isinstance(self.base, PartedCheckpoint) else None

    @property
    def made(self) -> frozenset[str]:
        return frozenset(self.forms)

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        assert self.base is not None
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            owner, part = split_name(name)
            parts.setdefault(owner, {})[part] = info
        found = {}
        for module in self.base.modules.values():
            if module.name in self.forms:
                found[module.name] = StoredModule(
                    module.name, parts[module.name], module.shape, self.forms[module.name]
                )
            elif all(info.name in self.tensors for info in module.parts.values()):  # not a tied head stored once more
                kept = {part: self.tensors[info.name] for part, info in module.parts.items()}
                found[module.name] = StoredModule(module.name, kept, module.shape, module.format)
        for tensor, copied in self.copies.items():
            name = split_name(tensor)[0]
            found[name] = StoredModule(name, parts[name], self.base.tensors[copied].shape, self.forms[name])
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, of how it is made, and of the importance."""
        assert self.base is not None
        return self._made_from(self.base.fingerprint, self.rounded.fingerprint if self.rounded is not None else "")

    @cached_property
    def identity(self) -> str:
        assert self.base is not None
        return self._made_from(self.base.identity, self.rounded.identity if self.rounded is not None else "")

    def _made_from(self, base: str, rounded: str) -> str:
        assert self.maker is not None
        digest = hashlib.sha256(f"{base} {json.dumps(dict(self.spec), sort_keys=True)}".encode())
        digest.update(json.dumps(self.maker.description(), sort_keys=True).encode())
        for name in sorted(self.importance or {}):
            digest.update(name.encode() + (self.importance or {})[name].cpu().numpy().tobytes())
        digest.update(" ".join(sorted(self.made)).encode() + rounded.encode())
        return digest.hexdigest()

    @property
    def working_bytes(self) -> int:
        """Memory at most that making a weight takes, beside the weight as it is read and as it comes out, and what the
        maker keeps."""
        assert self.maker is not None
        largest = max((module.numel for name, module in self.modules.items() if name in self.forms), default=0)
        return self.maker.bytes_per_weight * largest + self.maker.kept_bytes

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        assert self.base is not None
        if split_name(tensor)[0] in self.forms and not tensor.endswith(".bias"):
            raise UnsupportedError(f"{self.label}: {tensor} is made on the fly and stored nowhere")
        return self.base.read(tensor, device)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """As Checkpoint.load; the weight of a made module is rounded here and now, on `device`."""
        assert self.base is not None
        assert self.maker is not None
        name, part = split_name(tensor)
        if self.rounded is not None and name in self.forms and part == "weight":
            found = self.rounded.modules.get(name)
            if found is not None and found.is_quantized:
                return self.rounded.load(tensor, device=device)
        value = self.base.load(self.copies.get(tensor, tensor), device=device)
        if name not in self.forms or part != "weight":
            return value
        if name in self._turned:
            value = value.T.contiguous()
        return self.maker.round(self.base, name, value, self.importance)

    def made_group(self, module: str) -> Mapping[str, Any] | None:
        return self.maker.group if self.maker is not None and module in self.forms else None

    @cached_property
    def _turned(self) -> frozenset[str]:
        from recompile.model.roles import turned_modules

        return turned_modules(self.base) if self.base is not None and "gguf" not in self.forms.values() else frozenset()


def make_variant(
    base: Checkpoint,
    spec: Spec,
    importance: Mapping[str, Tensor] | None = None,
    maker: Maker | None = None,
    rounded: Checkpoint | None = None,
) -> MadeVariant:
    """The variant of a dense base that `spec` describes: what model_quantize would quantize is, all else is the base's.

    importance: module -> float32 [in], its mean squared inputs, for makers that weigh errors; None: all alike
    maker: of the spec, where it is not the plain one; rounded: the same variant as model_quantize made it
    A base that is quantized itself is decoded. Raises FormatError where nothing would be quantized; UnsupportedError
    for a GGUF type of a model that has no names in GGUF, and for a base that cannot be decoded.
    """
    maker = maker or maker_of(spec)
    base = as_dense(base, to_gguf=str(maker.description().get("format")) == "gguf")
    stored = maker.store(base)
    label = f"{base.label} ({', '.join(f'{key}: {value}' for key, value in spec.items())})"
    config = {**base.config, "tie_word_embeddings": False} if stored.copies else base.config
    return MadeVariant(
        base.path, label, config, stored.tensors, (), {}, base, spec, importance, maker, stored.formats,
        stored.fallbacks, stored.copies, rounded,
    )  # fmt: skip


def make_variants(
    base: Checkpoint,
    specs: Sequence[tuple[SourceId, Spec]],
    importance: Mapping[str, Tensor] | None = None,
    literal: frozenset[str] = frozenset(),
    keep_bytes: int = 0,
    rounded: Mapping[str, Checkpoint] | None = None,
) -> list[tuple[SourceId, MadeVariant]]:
    """The candidates of one run; what several of their types fall back to is encoded once.

    importance: module -> float32 [in], as `make_variant` takes it; literal: see GgufMaker; keep_bytes: of encodings of
    GGUF types, EXL2 and MLX that may stay in memory; rounded: by label, those that model_quantize made
    """
    from recompile.quantize.fake_quant import SharedEncodings

    shared = SharedEncodings(keep_bytes)
    return [
        (
            source_id,
            make_variant(
                base, spec, importance, maker_of(spec, literal, shared), (rounded or {}).get(candidate_label(source_id))
            ),
        )
        for source_id, spec in specs
    ]


def making_bytes(candidates: Iterable[object]) -> int:
    """Memory at most that making candidates takes, one weight at a time; 0 for those on disk."""
    return max((found.working_bytes for found in candidates if isinstance(found, MadeVariant)), default=0)


def fallbacks_of(candidates: Iterable[tuple[SourceId, Checkpoint]]) -> list[str]:
    """What types become where their blocks do not divide a row, a line for each that is so anywhere."""
    lines = []
    for source_id, found in candidates:
        if not isinstance(found, MadeVariant):
            continue
        for (asked, got), count in Counter(found.fallbacks.values()).items():
            lines.append(
                f"{candidate_label(source_id)}: {count} of {len(found.forms)} matrices asked to be {asked} get {got}"
            )
    return lines


def plainly_named(
    choice: Mapping[str, str], groups: Iterable[ProfileGroup], candidates: Mapping[str, Checkpoint]
) -> dict[str, str]:
    """The same choice, group -> candidate label, where a type falls back from the candidate that is called what its
    matrices get: IQ4_NL where IQ3_S would become that, if IQ4_NL is offered."""
    named = dict(choice)
    for group in groups:
        variant = candidates[choice[group.name]]
        if not isinstance(variant, MadeVariant) or not any(module in variant.fallbacks for module in group.modules):
            continue
        got = [variant.tensors[f"{module}.weight"].dtype for module in group.modules]
        for label, other in candidates.items():
            if isinstance(other, MadeVariant) and not any(module in other.fallbacks for module in group.modules):
                there = [other.tensors.get(f"{module}.weight") for module in group.modules]
                if [info.dtype for info in there if info is not None] == got and "type" in other.spec:
                    named[group.name] = label
                    break
    return named


# ---- what is kept beside a profile -----------------------------------------------------------------------------------


def rounded_dir(profile: Path) -> Path:
    """Where candidates that are rounded with error feedback are kept, a directory each."""
    return profile.with_name(f"{profile.name}.rounded")


def open_rounded(profile: Path, label: str) -> Checkpoint:
    """A candidate that was rounded with error feedback. Raises CheckpointError where it is gone."""
    from recompile.quantize.encoders import variant_name

    name = variant_name(float(label)) if re.fullmatch(r"\d+(\.\d+)?", label) else label
    path = rounded_dir(profile) / name
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not there, and {profile} measured candidate {label} as it was rounded with error feedback into "
            f"it; profile it again"
        )
    return open_checkpoint(path)


def importance_file(profile: Path) -> Path:
    """Where the importance that candidates were made with is kept."""
    return profile.with_name(f"{profile.name}.importance.safetensors")


def check_importance_file(profile: Path) -> None:
    """Raise OutputError where something stands in its place that this tool did not make."""
    path = importance_file(profile)
    if os.path.lexists(path) and not (path.is_file() and was_made_here(path)):
        raise OutputError(
            f"{path}: exists, and this tool did not make it; the importance of the candidates is kept under this name: "
            f"move it away, or choose another {{out}}"
        )


def save_importance(importance: Mapping[str, Tensor], profile: Path) -> None:
    """importance: module -> float32 [in]. Raises OutputError where it cannot be written, or is a file that this tool
    did not make."""
    check_importance_file(profile)
    tensors = {name: value.cpu().contiguous().clone() for name, value in importance.items()}
    save_tensors(importance_file(profile), tensors, {"made_by": "recompile"})


def keep_importance(profile: Path, offered: Iterable[tuple[SourceId, Checkpoint]]) -> None:
    """Save what candidates were made with beside their profile, whose journal is begun; nothing where they were made
    without, or where the profile is one of other candidates. Raises OutputError, JournalError."""
    made = [found for _, found in offered if isinstance(found, MadeVariant)]
    importance = next((found.importance for found in made if found.importance is not None), None)
    if importance is None:
        return
    if profile.exists():
        there = [candidate.fingerprint for candidate in load_profile(profile).header.candidates]
        if there != [found.identity for found in made]:
            return
    save_importance(importance, profile)


def load_importance(profile: Path) -> dict[str, Tensor] | None:
    """Module -> float32 [in]; None where the candidates of the profile were made without."""
    path = importance_file(profile)
    return read_importance(path) if path.exists() else None


def read_importance(path: Path) -> dict[str, Tensor]:
    """Module -> [in] float32, as a profile left it. Raises CheckpointError."""
    return read_tensors(path, way_out="; remove it and profile again")


def open_candidates(profile: Profile, path: Path) -> dict[str, Checkpoint]:
    """label -> variant of a profile's candidates: opened, or made anew where they are made on the fly."""
    header = profile.header
    found: dict[str, Checkpoint] = {c.label: open_checkpoint(c.model_dir) for c in header.candidates if c.spec is None}
    specs = [(candidate.id, candidate.spec) for candidate in header.candidates if candidate.spec is not None]
    if specs:
        from recompile.quantize.fake_quant import KEEP_BYTES

        roles = frozenset(role_of(module) for group in header.groups for module in group.modules)
        base, importance = open_checkpoint(header.reference), load_importance(path)
        rounded = {c.label: open_rounded(path, c.label) for c in header.candidates if c.feedback}
        made = make_variants(base, specs, importance, roles - {"layer"}, KEEP_BYTES, rounded)
        found |= {candidate_label(source_id): variant for source_id, variant in made}
    return {candidate.label: found[candidate.label] for candidate in header.candidates}
