"""Candidates made on the fly: a variant that is on no disk, each weight rounded when it is asked for.

A profile of such candidates says which mix to make before anything is quantized; `model_quantize -or` then makes just
that mix in one calibrated pass. A weight goes through the grids and the scale search of model_quantize (method "mse",
optionally with importance from calibration rows) without GPTQ, and is decoded at once: nothing is kept, so a run holds
no more than the weights it asked for. Sizes are those of the stored form, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.checkpoint import Checkpoint, StoredModule, TensorInfo, open_checkpoint, split_name
from recompile.costs import ROUTERS, Profile
from recompile.errors import CheckpointError, FormatError, OutputError, UnsupportedError
from recompile.overlay import role_of
from recompile.recipe import SourceId

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recompile.quantize.encoders import IntEncoder

Spec = Mapping[str, Any]  # how a candidate is made, as a source of a recipe says it: {"bits": 4, "group_size": 32}
DEFAULTS: Mapping[str, Any] = {"group_size": 64, "symmetric": True}  # model_quantize's own
NOWHERE = Path("(made on the fly)")


def parse_candidates(texts: Sequence[str]) -> list[str]:
    """`--candidates 2,3,4` or `2 3 4` -> ["2", "3", "4"]. Raises FormatError for an empty or a repeated one."""
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise FormatError("--candidates: names no candidate; wanted bits, e.g. --candidates 2,3,4,6")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FormatError(f"--candidates: {twice} is given twice")
    return names


def spec_of(name: str, **settings: Any) -> tuple[SourceId, dict[str, Any]]:
    """The id and the spec of a candidate as the user calls it: "4" -> (4, {"bits": 4}). Settings that are the default
    are left out. Raises FormatError for a name that nothing here can make."""
    if re.fullmatch(r"\d+", name) is None:
        raise FormatError(
            f"--candidates {name}: wanted whole bits from 2 to 8; other kinds of candidates cannot be made on the fly"
        )
    bits = int(name)
    return bits, {"bits": bits, **{key: value for key, value in settings.items() if DEFAULTS[key] != value}}


def encoder_of(spec: Spec, method: str = "mse", importance: bool = True) -> IntEncoder:
    """The encoder of one candidate. Raises FormatError for a spec that asks for what the format does not have."""
    from recompile.quantize.encoders import IntEncoder

    unknown = set(spec) - {"bits", *DEFAULTS}
    if "bits" not in spec or unknown:
        raise FormatError(f"{dict(spec)}: wanted bits, and optionally {', '.join(DEFAULTS)}")
    settings = {key: spec.get(key, value) for key, value in DEFAULTS.items()}
    return IntEncoder([spec["bits"]], settings["group_size"], settings["symmetric"], method, importance)


@dataclass(frozen=True)
class MadeVariant(Checkpoint):
    """A variant of `base` in the clothes of a Checkpoint. Make with `make_variant`."""

    base: Checkpoint | None = None
    spec: Spec = field(default_factory=dict)
    importance: Mapping[str, Tensor] | None = None  # module -> [in], mean square of every input
    made: frozenset[str] = frozenset()  # modules that are quantized

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        assert self.base is not None
        return {name: self._made_module(module) for name, module in self.base.modules.items()}

    def _made_module(self, module: StoredModule) -> StoredModule:
        if module.name not in self.made:
            return module
        prefix = f"{module.name}."
        parts = {
            part: self.tensors[prefix + part]
            for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "bias")
            if prefix + part in self.tensors
        }
        return StoredModule(module.name, parts, module.shape, "pack-quantized")

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, of how it is made, and of the importance."""
        assert self.base is not None
        digest = hashlib.sha256(f"{self.base.fingerprint} {json.dumps(dict(self.spec), sort_keys=True)}".encode())
        digest.update(json.dumps(encoder_of(self.spec).description(), sort_keys=True).encode())
        for name in sorted(self.importance or {}):
            digest.update(name.encode() + (self.importance or {})[name].cpu().numpy().tobytes())
        digest.update(" ".join(sorted(self.made)).encode())
        return digest.hexdigest()

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        assert self.base is not None
        if split_name(tensor)[0] in self.made and not tensor.endswith(".bias"):
            raise UnsupportedError(f"{self.label}: {tensor} is made on the fly and stored nowhere")
        return self.base.read(tensor, device)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """As Checkpoint.load; the weight of a made module is rounded here and now, on `device`."""
        assert self.base is not None
        value = self.base.load(tensor, device=device)
        name, part = split_name(tensor)
        if name not in self.made or part != "weight":
            return value
        diagonal = (self.importance or {}).get(name)
        if diagonal is not None:
            diagonal = diagonal.to(value.device)
        (encoded,) = encoder_of(self.spec).round(name, value.float(), diagonal)
        return encoded.dense


def make_variant(base: Checkpoint, spec: Spec, importance: Mapping[str, Tensor] | None = None) -> MadeVariant:
    """The variant of a dense base that `spec` describes: what model_quantize would quantize is, all else is the base's.

    Raises FormatError where the base is quantized already, or where nothing would be.
    """
    if base.is_quantized:
        raise FormatError(f"{base.label}: is quantized already ({', '.join(base.formats)}); a dense base is wanted")
    encoder = encoder_of(spec)
    made: dict[str, StoredModule] = {}
    reason = "it has no linear layers"
    for module in base.modules.values():
        linear = ".layers." in f".{module.name}" and module.shape is not None and len(module.shape) == 2
        if not linear or role_of(module.name) != "layer" or module.name.rpartition(".")[2] in ROUTERS:
            continue
        assert module.shape is not None
        why = encoder.why_not(module.name, (module.shape[0], module.shape[1]))
        if why is None:
            made[module.name] = module
        else:
            reason = f"{module.name}: {why}"
    if not made:
        raise FormatError(f"{base.label}: nothing would be quantized; {reason}")
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], dict[str, tuple[str, tuple[int, ...], int]]] = {}
    for name, info in base.tensors.items():
        owner, part = split_name(name)
        if owner not in made or part != "weight":
            tensors[name] = info
            continue
        if info.shape not in shapes:
            shapes[info.shape] = _stored_parts(encoder, info.shape)
        for stored, (dtype, shape, size) in shapes[info.shape].items():
            tensors[f"{owner}.{stored}"] = TensorInfo(f"{owner}.{stored}", dtype, shape, NOWHERE, 0, size)
    label = f"{base.label} ({', '.join(f'{key}: {value}' for key, value in spec.items())})"
    return MadeVariant(base.path, label, base.config, tensors, (), {}, base, spec, importance, frozenset(made))


def _stored_parts(encoder: IntEncoder, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """part -> (dtype, shape, bytes) of a matrix of this shape: that of an empty one, made and looked at."""
    import torch
    from safetensors.torch import _TYPES as TORCH_DTYPES

    spelled = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    (encoded,) = encoder.round("model.layers.0.x", torch.zeros(shape), None)
    return {
        part: (spelled[value.dtype], tuple(value.shape), value.numel() * value.element_size())
        for part, value in encoded.parts.items()
    }


# ---- importance beside a profile -------------------------------------------------------------------------------------


def importance_file(profile: Path) -> Path:
    """Where the importance that candidates were made with is kept."""
    return profile.with_name(f"{profile.name}.importance.safetensors")


def save_importance(importance: Mapping[str, Tensor], profile: Path) -> None:
    """Raises OutputError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = importance_file(profile)
    temporary = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous().clone() for name, value in importance.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def load_importance(profile: Path) -> dict[str, Tensor] | None:
    """None where the candidates of the profile were made without."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = importance_file(profile)
    try:
        return load_file(path) if path.exists() else None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; remove it and profile again") from error


def open_candidates(profile: Profile, path: Path) -> dict[str, Checkpoint]:
    """label -> variant of a profile's candidates: opened, or made anew where they are made on the fly."""
    reference: Checkpoint | None = None
    importance: Mapping[str, Tensor] | None = None
    found: dict[str, Checkpoint] = {}
    for candidate in profile.header.candidates:
        if candidate.spec is None:
            found[candidate.label] = open_checkpoint(candidate.model_dir)
            continue
        if reference is None:
            reference, importance = open_checkpoint(profile.header.reference), load_importance(path)
        found[candidate.label] = make_variant(reference, candidate.spec, importance)
    return found
