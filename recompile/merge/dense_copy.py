"""A decoded copy: the tensors and the config of a checkpoint whose every weight is dense. Decoding needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import (
    GgufCheckpoint,
    MlxCheckpoint,
    PartedCheckpoint,
    StoredModule,
    TensorInfo,
    dense_dtype,
    no_table_of_names,
)
from recompile.errors import CheckpointError, UnsupportedError
from recompile.formats import DTYPE_BYTES, FORMATS, mlx_config
from recompile.gguf.names import Joined
from recompile.merge.configs import origin_of, without_quantization
from recompile.merge.fuse_experts import FusedExperts
from recompile.merge.overlay import Overlay, Placement
from recompile.merge.write_plan import (
    PlannedModule,
    PlannedTensor,
    WantedTensor,
    WritePlan,
    copied_tensors,
    wanted_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor


def dense_config(overlay: Overlay) -> dict[str, Any]:
    """config.json of a decoded copy: without quantization, with the dtype that it is written in."""
    config = without_quantization(overlay.config)
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dense_dtype(overlay.base.modules.values()))
    if name is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = name
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = name
    return config


def check_decodable(overlay: Overlay, ordered: Sequence[Placement]) -> None:
    """Raise UnsupportedError for a format that cannot be decoded, FormatError for a module that no config covers."""
    if isinstance(overlay.base, GgufCheckpoint) and overlay.base.heads is None:
        raise UnsupportedError(
            f"{overlay.base.label}: {no_table_of_names(overlay.base.file.value('general.architecture'))}"
        )
    for placement in ordered:
        if not FORMATS[placement.stored.format].runnable:
            raise UnsupportedError(
                f"{origin_of(placement)}: {placement.module} is stored as {placement.stored.format}, which cannot be "
                f"decoded; take that module from another variant"
            )
        if placement.stored.is_quantized:
            placement.checkpoint.scheme(placement.stored)


def dense_tensors(
    overlay: Overlay,
    ordered: Sequence[Placement],
    shapes: Mapping[str, tuple[int, ...]],
    fused: Sequence[FusedExperts],
    turned: frozenset[str] = frozenset(),
) -> list[list[WantedTensor]]:
    """The tensors of a decoded copy: dense modules as they are, others as `weight` (and `bias`) of their true shape,
    experts of one tensor a layer as that tensor; turned: modules whose dense weight is [in, out].
    """
    dtype = dense_dtype(overlay.base.modules.values())
    together: dict[str, list[FusedExperts]] = {}
    for whole in fused:
        together.setdefault(whole.module, []).append(whole)
    whole_of = {name: whole for whole in overlay.joined.values() for names in whole.parts for name in names}
    wanted: list[list[WantedTensor]] = []
    for placement in ordered:
        stored = placement.stored
        if stored.name in together:
            wanted.append([wanted_tensor(whole.name, dtype, whole.shape) for whole in together[stored.name]])
            continue
        if isinstance(placement.checkpoint, GgufCheckpoint):  # stored in GGUF's own order and convention
            infos = [info for _, info in sorted(stored.parts.items()) if info.name in placement.checkpoint.places]
            held = [(whole_of.get(info.name), info) for info in infos]
            wanted.append(
                [
                    wanted_tensor(info.name, dtype, _shape(info.shape, stored, turned))
                    if joined is None
                    else _joined(overlay, joined, dtype)
                    for joined, info in held
                    if joined is None or info.name == joined.parts[0][0]
                ]
            )
            continue
        part = f"{stored.name}.weight"
        if part in whole_of:  # of a head, in MLX's: with the first comes the whole
            by_head = whole_of[part]
            wanted.append([_joined(overlay, by_head, dtype)] if part == by_head.parts[0][0] else [])
            continue
        if not stored.is_quantized:
            wanted.append(_restored(placement) or copied_tensors(placement))
            continue
        shape = shapes.get(stored.name) or stored.shape
        assert shape is not None, stored.name
        tensors = [wanted_tensor(f"{stored.name}.weight", dtype, _shape(shape, stored, turned))]
        if "bias" in stored.parts:
            bias = stored.parts["bias"]
            # The padding is at the end, so the true bias is a prefix of the stored bytes.
            cut = TensorInfo(
                bias.name, bias.dtype, shape[:1], bias.path, bias.offset, shape[0] * DTYPE_BYTES[bias.dtype]
            )
            tensors.insert(0, WantedTensor(bias.name, bias.dtype, shape[:1], cut, cut.size_bytes))
        wanted.append(tensors)
    return wanted


def _restored(placement: Placement) -> list[WantedTensor]:
    """Of a dense module that mlx-lm keeps with other values than transformers; nothing of others."""
    if not isinstance(placement.checkpoint, MlxCheckpoint):
        return []
    infos = [info for _, info in sorted(placement.stored.parts.items())]
    changed = any(mlx_config.adds_one(placement.checkpoint.config, info.name) for info in infos)
    return [wanted_tensor(info.name, info.dtype, info.shape) for info in infos] if changed else []


def _shape(shape: tuple[int, ...], stored: StoredModule, turned: frozenset[str]) -> tuple[int, ...]:
    return shape[::-1] if stored.is_quantized and stored.name in turned else shape


def _joined(overlay: Overlay, whole: Joined, dtype: str) -> WantedTensor:
    """A tensor that Hugging Face's checkpoints fuse and the base keeps in parts."""
    assert isinstance(overlay.base, PartedCheckpoint), "no other keeps tensors in parts"
    return wanted_tensor(whole.name, dtype, overlay.base.joined_shape(whole))


def true_shapes(overlay: Overlay) -> dict[str, tuple[int, ...]]:
    """The shape without padding of every module that is stored padded.

    From another checkpoint of the mix that holds the module unpadded, else from the model that config.json describes.
    """
    found: dict[str, tuple[int, ...]] = {}
    missing = []
    for name, stored in overlay.modules.items():
        if FORMATS[stored.format].pads_to is None:
            continue
        unpadded = (c.modules.get(name) for c in overlay.checkpoints)
        shape = next(
            (m.shape for m in unpadded if m is not None and FORMATS[m.format].pads_to is None and m.shape), None
        )
        if shape is not None:
            found[name] = shape
        else:
            missing.append(name)
    if missing:
        from recompile.model.stream import LayeredModel

        model = LayeredModel.of(overlay)
        parameters = dict(model.model.named_parameters(remove_duplicate=False))
        for name in missing:
            found[name] = _shape_in_model(overlay, model, parameters, name)
    return found


def _shape_in_model(overlay: Overlay, model: Any, parameters: Mapping[str, Any], module: str) -> tuple[int, ...]:
    tensor = f"{module}.weight"
    stored = overlay.modules[module].shape
    for name, origin in model.origins.items():
        if tensor not in origin.tensors:
            continue
        shape = tuple(parameters[name].shape)
        shape = shape[::-1] if model.is_turned(module) else shape
        if origin.converter is not None and len(shape) == 3:  # experts in one tensor, some projections side by side
            side_by_side = len(set(origin.patterns))
            shape = (shape[1] // side_by_side, shape[2])
        fits = stored is None or all(true <= padded for true, padded in zip(shape, stored, strict=True))
        if len(shape) == 2 and fits:
            return shape
    raise UnsupportedError(
        f"{overlay.label}: {module} is stored padded as {list(stored or ())}, and its true shape does not follow from "
        f"config.json, so that it cannot be decoded to a dense copy"
    )


def decode_planned(plan: WritePlan, module: PlannedModule, tensor: PlannedTensor) -> memoryview:
    """The bytes of one decoded weight. Raises CheckpointError for values that the dense dtype cannot hold."""
    import torch
    from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

    info = tensor.info
    dtype = TORCH_DTYPES[info.dtype]
    assert dtype is not None, "decoded weights are of a float dtype"
    whole = plan.fused.get(info.name)
    value: Tensor = plan.overlay.load(info.name) if whole is None else whole.make(plan.overlay, plan.true_shapes, dtype)
    stored = module.placement.stored
    if stored.is_quantized and stored.name in plan.turned and value.dim() == 2:
        value = value.T
    if any(have < want for have, want in zip(value.shape, info.shape, strict=True)):
        raise CheckpointError(
            f"{origin_of(module.placement)}: {info.name} decodes to {list(value.shape)}, wanted {info.shape}"
        )
    value = value[tuple(slice(0, size) for size in info.shape)].to(dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{origin_of(module.placement)}: {info.name} has values beyond the range of {info.dtype}; use a base whose "
            f"dense tensors are bfloat16"
        )
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
