"""Modules that a merge stores in another form than their source: planned from headers, carried out when written.

GPTQ, AWQ and AutoRound modules become compressed-tensors `pack-quantized`, DeepSeek-style and ModelOpt fp8 become
`float-quantized` and ModelOpt's nvfp4 `nvfp4-pack-quantized`, where that is exact: the same codes, zero points and
scales, so that every decoded weight is the same to the last bit. Where it is not exact it is refused with the reason.
ModelOpt's nvfp4 multiplies by a scale a tensor where compressed-tensors divides, and few floats have a reciprocal that
does the same to the last bit: `--reencode` takes the nearest. It also gives nvfp4 modules of a fused set one global
scale. Neither is exact, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from recompile.arguments import Worded
from recompile.checkpoint.checkpoint import Checkpoint, MlxCheckpoint, StoredModule
from recompile.costs import fused_sets
from recompile.errors import UnsupportedError
from recompile.formats import compressed_tensors, mlx_config
from recompile.merge.engine_rules import has_trivial_order
from recompile.merge.overlay import Overlay, Placement

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
# Besides what compressed-tensors has itself; ModelOpt's fp8 is stored like its own and told by the config.
CONVERTIBLE = frozenset({"gptq", "awq", "fp8-scale-inv", "nvfp4-modelopt"})
MODELOPT = "modelopt"
SIGNIFICANDS = tuple(1 + n / 8 for n in range(8))  # of 8-bit float scales; powers of two change nothing
GLOBAL_PARTS = ("weight_global_scale", "input_global_scale")


@dataclass(frozen=True)
class Conversion:
    """How one module changes.

    format: of the result, a key of FORMATS
    parts:  part -> (dtype in safetensors spelling, shape) of the result
    group:  its config group without targets; None: the source's
    run:    the source's parts -> the result's parts
    exact:  whether every decoded weight stays the same
    note:   what to tell the user
    """

    format: str
    parts: Mapping[str, tuple[str, tuple[int, ...]]]
    group: Mapping[str, Any] | None
    run: Callable[[Parts], dict[str, Tensor]]
    exact: bool = True
    note: str = ""


def plan_conversions(overlay: Overlay, *, reencode: bool = False) -> dict[str, Conversion]:
    """The modules that have to change for all of the mix to be one compressed-tensors checkpoint.

    Empty where nothing is overridden. Raises UnsupportedError for a module that cannot be expressed exactly, and for
    fused sets of nvfp4 modules from different sources whose global scales differ, unless `reencode`.
    """
    if overlay.overridden == 0:
        return {}
    found: dict[str, Conversion] = {}
    for name, placement in overlay.placements.items():
        if placement.stored.format == "nvfp4-modelopt":
            found[name] = _modelopt_nvfp4(placement.checkpoint, placement.stored, reencode)
        elif _is_modelopt_fp8(placement):
            found[name] = _modelopt_fp8(placement.checkpoint, placement.stored)
        elif placement.stored.format in CONVERTIBLE:
            found[name] = plan_conversion(placement.checkpoint, placement.stored)
    return found | _one_global_scale(overlay, reencode, found)


def norm_changes(overlay: Overlay, as_mlx: bool) -> dict[str, Conversion]:
    """Norms that mlx-lm keeps with 1 added, where their source has them otherwise than the output: transformers' in an
    output of MLX's, and the other way round. As mlx-lm does it, the sum is rounded to the dtype of the norm."""
    found: dict[str, Conversion] = {}
    for name, placement in overlay.placements.items():
        changed = not placement.stored.is_quantized and mlx_config.adds_one(overlay.config, f"{name}.weight")
        if changed and isinstance(placement.checkpoint, MlxCheckpoint) != as_mlx:
            parts = {part: (info.dtype, info.shape) for part, info in placement.stored.parts.items()}
            found[name] = Conversion(
                placement.stored.format, parts, None, partial(_add, 1 if as_mlx else -1), exact=False
            )
    return found


def _add(what: int, parts: Parts) -> dict[str, Tensor]:
    return {**parts, "weight": (parts["weight"].float() + what).to(parts["weight"].dtype)}


def plan_conversion(checkpoint: Checkpoint, module: StoredModule) -> Conversion:
    """A GPTQ, AWQ, AutoRound or DeepSeek-fp8 module as compressed-tensors. Raises UnsupportedError with the reason."""
    scheme = checkpoint.scheme(module)
    if module.format == "fp8-scale-inv":
        return _fp8(checkpoint, module, scheme)
    assert module.shape is not None, module.name
    out_features, in_features = module.shape
    if not has_trivial_order(checkpoint, module, scheme.group_size):
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name} was made with activation order (its g_idx scatters the columns of a "
            f"group), which compressed-tensors no longer stores; take it from a variant without desc_act, or write a "
            f"decoded copy with {{dense}}"
        )
    if scheme.group_size is not None and in_features % scheme.group_size:
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name} has {in_features} columns in groups of {scheme.group_size}, the last "
            f"one short, which compressed-tensors kernels do not run; take it from another variant or use {{dense}}"
        )
    from recompile.formats.packed_int import IntScheme

    is_awq = module.format == "awq"
    symmetric = not scheme.zero_point if is_awq else scheme.symmetric is True
    target = IntScheme(4 if is_awq else scheme.bits, scheme.group_size, symmetric)
    groups = target.count_groups(in_features)
    scale = module.parts["scales"].dtype
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (out_features, -(-in_features * target.bits // 32))),
        "weight_scale": (scale, (out_features, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not symmetric:
        parts["weight_zero_point"] = ("I32", (-(-out_features * target.bits // 32), groups))
    if "bias" in module.parts:
        parts["bias"] = (module.parts["bias"].dtype, module.parts["bias"].shape)
    dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(scale, scale)
    return Conversion(
        "pack-quantized",
        dict(sorted(parts.items())),
        _group("pack-quantized", target.to_config()),
        lambda stored: _repack(stored, scheme, target, is_awq, module.name),
        note=f"{module.format} modules are re-expressed as compressed-tensors pack-quantized, exactly; load the result "
        f"in {dtype}, the dtype of their scales, or engines round those",
    )


def _group(fmt: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": fmt, "weights": dict(weights), "input_activations": None, "output_activations": None}


def _repack(stored: Parts, scheme: Any, target: Any, is_awq: bool, module: str) -> dict[str, Tensor]:
    import torch

    from recompile.formats import awq, gptq, packed_int

    code = awq if is_awq else gptq
    code.dequantize(stored, scheme, module=module)  # raises for parts that do not fit: the symmetric zeros above all
    out_features = stored["scales"].shape[1]
    if is_awq:
        codes, zeros = awq.unpack_words(stored["qweight"]).t(), awq.unpack_words(stored["qzeros"]).t()
    else:
        words = stored["qweight"].t().contiguous()  # [O, words]
        g_idx = stored.get("g_idx")
        in_features = words.shape[1] * 32 // scheme.bits if g_idx is None else len(g_idx)
        codes = gptq.unpack_codes(words, scheme, in_features)
        zeros = gptq.unpack_zeros(stored["qzeros"], scheme, out_features).t()
    half = 1 << (target.bits - 1)
    made = packed_int.pack(
        codes.int() - half,
        stored["scales"].t().float(),
        None if target.symmetric else (zeros.int() - half).contiguous(),
        target,
        stored["scales"].dtype,
    )
    assert torch.equal(made["weight_scale"], stored["scales"].t()), "float32 holds every 16-bit scale"
    return made | ({"bias": stored["bias"]} if "bias" in stored else {})


def _fp8(checkpoint: Checkpoint, module: StoredModule, scheme: Any) -> Conversion:
    grid = scheme.grid
    if module.parts["weight"].dtype != "F8_E4M3":
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name} is {module.parts['weight'].dtype}, compressed-tensors has F8_E4M3 only"
        )
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    if grid.rows is not None and grid.columns is not None:
        weights |= {"strategy": "block", "block_structure": [grid.rows, grid.columns]}
    elif grid.rows is not None:
        weights["strategy"] = "channel"
    renamed = {"weight_scale" if part == "weight_scale_inv" else part: info for part, info in module.parts.items()}
    return Conversion(
        "float-quantized",
        {part: (info.dtype, info.shape) for part, info in sorted(renamed.items())},
        _group("float-quantized", weights | {"dynamic": False}),
        lambda stored: {("weight_scale" if p == "weight_scale_inv" else p): value for p, value in stored.items()},
        note="fp8 modules with weight_scale_inv are re-expressed as compressed-tensors float-quantized, exactly",
    )


# ---- ModelOpt --------------------------------------------------------------------------------------------------------


def _is_modelopt_fp8(placement: Placement) -> bool:
    return (
        placement.stored.format == "float-quantized"
        and placement.checkpoint.quantization_config.get("quant_method") == MODELOPT
    )


def _check_modelopt_parts(checkpoint: Checkpoint, module: StoredModule, known: frozenset[str]) -> None:
    unknown = sorted(module.parts.keys() - known - {"weight", "weight_scale", "input_scale", "bias"})
    if unknown:
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name} has {unknown[0]} (ModelOpt), which compressed-tensors lacks; "
            f"take it from another variant, or write a decoded copy with {{dense}}"
        )


def _modelopt_fp8(checkpoint: Checkpoint, module: StoredModule) -> Conversion:
    """The same codes and scales; a static scale of the inputs comes along."""
    _check_modelopt_parts(checkpoint, module, frozenset())
    if module.parts["weight_scale"].numel != 1:
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name}.weight_scale is {list(module.parts['weight_scale'].shape)}, and "
            f"ModelOpt's fp8 is read here with one scale a tensor; write a decoded copy with {{dense}}"
        )
    static = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = _group("float-quantized", static)
    if "input_scale" in module.parts:
        group["input_activations"] = dict(static)
    scales = {"weight_scale", "input_scale"}
    return Conversion(
        "float-quantized",
        {part: (info.dtype, (1,) if part in scales else info.shape) for part, info in sorted(module.parts.items())},
        group,
        lambda stored: {part: value.reshape(1) if part in scales else value for part, value in stored.items()},
        note="fp8 modules of ModelOpt are re-expressed as compressed-tensors float-quantized, exactly",
    )


def _modelopt_nvfp4(checkpoint: Checkpoint, module: StoredModule, reencode: bool) -> Conversion:
    """weight_global_scale divides where weight_scale_2 multiplies."""
    _check_modelopt_parts(checkpoint, module, frozenset({"weight_scale_2"}))
    scale = _stored_scalar(module, "weight_scale_2")
    assert scale is not None, module.name
    divisor, exact = reciprocal(scale)
    if not exact and not reencode:
        raise UnsupportedError(
            f"{checkpoint.label}: {module.name} is nvfp4 of ModelOpt, whose weight_scale_2 ({scale:.9g}) multiplies; "
            f"compressed-tensors divides by a global scale, and no float32 divides to the same weights to the last "
            f"bit; take the nearest (weights change by less than 1e-6 of themselves) with {{reencode}}, or write a "
            f"decoded copy with {{dense}}"
        )
    rows, half = module.parts["weight"].shape
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("U8", (rows, half)),
        "weight_scale": (module.parts["weight_scale"].dtype, module.parts["weight_scale"].shape),
        "weight_global_scale": ("F32", (1,)),
    }
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    group = _group("nvfp4-pack-quantized", weights | {"dynamic": False, "scale_dtype": "torch.float8_e4m3fn"})
    inputs = _stored_scalar(module, "input_scale")
    if inputs is not None:
        parts["input_global_scale"] = ("F32", (1,))
        group["input_activations"] = weights | {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    if "bias" in module.parts:
        parts["bias"] = (module.parts["bias"].dtype, module.parts["bias"].shape)

    def run(stored: Parts) -> dict[str, Tensor]:
        import torch

        made = {"weight_packed": stored["weight"], "weight_scale": stored["weight_scale"]}
        made["weight_global_scale"] = torch.tensor([divisor], dtype=torch.float32)
        if inputs is not None:
            made["input_global_scale"] = torch.tensor([reciprocal(inputs)[0]], dtype=torch.float32)
        return made | ({"bias": stored["bias"]} if "bias" in stored else {})

    how = (
        "exactly"
        if exact
        else "with the nearest global scale ({reencode}): weights may change by less than 1e-6 of themselves"
    )
    return Conversion(
        "nvfp4-pack-quantized",
        dict(sorted(parts.items())),
        group,
        run,
        exact=exact,
        note=f"nvfp4 modules of ModelOpt are re-expressed as compressed-tensors nvfp4-pack-quantized, {how}",
    )


def reciprocal(scale: float) -> tuple[float, bool]:
    """The float32 g near 1 / scale for which s / g equals s * scale in float32 for every 8-bit float scale s; and
    whether there is one. Without one, the g nearest to 1 / scale. scale: a float32 above 0."""
    import torch

    multiplier = torch.tensor(scale, dtype=torch.float32)
    values = torch.tensor(SIGNIFICANDS, dtype=torch.float32)
    nearest = (1 / multiplier.double()).float()
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    for divisor in (nearest, below, above):
        if torch.equal(values / divisor, values * multiplier):
            return float(divisor), True
    return float(nearest), False


def _stored_scalar(module: StoredModule, part: str) -> float | None:
    info = module.parts.get(part)
    if info is None:
        return None
    from recompile.checkpoint.safetensors_files import read_tensor

    return float(read_tensor(info).float().reshape(-1)[0])


# ---- nvfp4 -----------------------------------------------------------------------------------------------------------


def _one_global_scale(overlay: Overlay, reencode: bool, converted: Mapping[str, Conversion]) -> dict[str, Conversion]:
    """Conversions that give the nvfp4 modules of every fused set one global scale.

    converted: modules that become nvfp4 of compressed-tensors
    """
    nvfp4 = [
        name
        for name, p in overlay.placements.items()
        if (converted[name].format if name in converted else p.stored.format) == "nvfp4-pack-quantized"
    ]
    found: dict[str, Conversion] = {}
    for members in fused_sets(nvfp4):
        placements = [overlay.placements[name] for name in members]
        common: dict[str, float] = {}
        for part in GLOBAL_PARTS:
            values = {name: _scalar(p, part) for name, p in zip(members, placements, strict=True)}
            known = {value for value in values.values() if value is not None}
            if len(known) > 1:
                common[part] = min(known)  # it divides: the least one leaves room for the largest weight of the set
        if not common:
            continue
        if not reencode:
            if len({id(p.checkpoint) for p in placements}) == 1:
                continue  # as its source has it; engines warn
            leaves = ", ".join(name.rpartition(".")[2] for name in members)
            raise UnsupportedError(
                f"{overlay.label}: {members[0].rpartition('.')[0]}: {leaves} are nvfp4 from different sources with "
                f"different {' and '.join(common)}, and engines that run them as one matrix would take the largest for "
                f"all; take them together from one source, or give them one scale with {{reencode}}"
            )
        for name, placement in zip(members, placements, strict=True):
            own = {part: _scalar(placement, part) for part in common}
            if any(own[part] is not None and own[part] != value for part, value in common.items()):
                found[name] = _reencoding(placement, common, converted.get(name))
    return found


def _scalar(placement: Placement, part: str) -> float | None:
    """A global scale as compressed-tensors has it: it divides."""
    if placement.stored.format != "nvfp4-modelopt":
        return _stored_scalar(placement.stored, part)
    name = "weight_scale_2" if part == "weight_global_scale" else "input_scale"
    multiplier = _stored_scalar(placement.stored, name)
    return None if multiplier is None else reciprocal(multiplier)[0]


def _reencoding(placement: Placement, common: Mapping[str, float], before: Conversion | None) -> Conversion:
    """before: what makes the module compressed-tensors in the first place"""
    parts = {part: (info.dtype, info.shape) for part, info in sorted(placement.stored.parts.items())}
    name = placement.module
    return Conversion(
        "nvfp4-pack-quantized",
        parts if before is None else before.parts,
        None if before is None else before.group,
        lambda stored: _with_global_scale(stored if before is None else before.run(stored), common, name),
        exact=False,
        note="nvfp4 modules were re-encoded with the global scale of their fused set ({reencode}): they are not byte "
        "for byte their source's, and model_diff -or measures them as the source has them",
    )


def _with_global_scale(stored: Parts, common: Mapping[str, float], module: str) -> dict[str, Tensor]:
    """s8' = e4m3(s8 * g'/g), and the codes nearest to the decoded weights on that grid."""
    import torch

    from recompile.formats import fp4

    made = dict(stored)
    if "input_global_scale" in common and "input_global_scale" in stored:
        made["input_global_scale"] = torch.full_like(stored["input_global_scale"], common["input_global_scale"])
    if "weight_global_scale" not in common:
        return made
    dense = fp4.dequantize(stored, fp4.Nvfp4Scheme(), module)
    old = stored["weight_global_scale"].float().reshape(())
    new = torch.full_like(stored["weight_global_scale"], common["weight_global_scale"])
    scale = (stored["weight_scale"].float() * (new.float().reshape(()) / old)).to(torch.float8_e4m3fn)
    factor = (scale.float() / new.float()).repeat_interleave(fp4.GROUP_SIZE, 1)
    values = torch.where(factor > 0, dense / factor, torch.zeros_like(dense))
    made |= {"weight_packed": fp4.pack_e2m1(fp4.round_e2m1(values)), "weight_scale": scale, "weight_global_scale": new}
    return made


def notes_of(conversions: Mapping[str, Conversion]) -> list[str]:
    """One line a kind of change, with how many modules it is about."""
    counts: dict[str, int] = {}
    for conversion in conversions.values():
        counts[conversion.note] = counts.get(conversion.note, 0) + 1
    return [Worded(f"{count} {note}") for note, count in counts.items()]


def is_expressible(formats: Sequence[str]) -> bool:
    """Whether modules of all these formats can stand in one compressed-tensors checkpoint."""
    from recompile.formats import FORMATS

    own = {spec.name for spec in FORMATS.values() if compressed_tensors.QUANT_METHOD in spec.readers}
    return set(formats) <= own | CONVERTIBLE | {"dense"}
