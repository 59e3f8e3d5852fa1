"""What the engine of a format would meet in a checkpoint: its configs and its stored parts, format by format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import INDEX_NAME, Checkpoint, GgufCheckpoint, StoredModule, read_json
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.checkpoint.tied_head import stored_head
from recompile.errors import CheckpointError, FormatError
from recompile.formats import exl2_config, exl3_config, mlx_config
from recompile.formats.compressed_tensors import QUANT_METHOD
from recompile.io.patterns import Regex, compile_regex
from recompile.merge.configs import COMPRESSED_FORMATS, is_linear
from recompile.merge.left_dense import is_plain, known_roles
from recompile.merge.problems import Problem
from recompile.merge.write_gguf import MAINLINE_ONLY

if TYPE_CHECKING:
    from torch import Tensor


def gguf_problems(checkpoint: GgufCheckpoint) -> list[Problem]:
    """What engines make of the types in a file whose header is whole."""
    kinds = {tensor.type.name: tensor.type for tensor in checkpoint.file.tensors.values()}
    fork, mainline = sorted(name for name in kinds if kinds[name].fork), sorted(kinds.keys() & MAINLINE_ONLY)
    if fork and mainline:
        found = f"holds {', '.join(fork)} of ik_llama.cpp and {', '.join(mainline)} of llama.cpp: no engine has both"
        return [Problem(checkpoint.label, found)]
    quantized = any(kind.is_quantized for kind in kinds.values())
    if quantized and "general.quantization_version" not in checkpoint.file.keys:
        return [Problem(checkpoint.label, "has quantized tensors and no key general.quantization_version", "warning")]
    return []


def readers_of(checkpoint: Checkpoint, formats: Collection[str]) -> list[Callable[[Checkpoint], Iterator[Problem]]]:
    """The checks that a checkpoint with modules of these formats has to pass, one a family of formats."""
    compressed = checkpoint.quantization_config.get("quant_method") == QUANT_METHOD
    found = [compressed_problems] if compressed and COMPRESSED_FORMATS & set(formats) else []
    return found + [look for name, look in _OF_ONE_FORMAT.items() if name in formats]


# ---- compressed-tensors ----


def compressed_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What is wrong with a compressed-tensors config, set against the modules that are stored."""
    config = checkpoint.quantization_config
    where = "config.json: quantization_config"
    if config.get("quantization_status") != "compressed":
        yield Problem(
            where,
            f'quantization_status is {config.get("quantization_status")!r}, wanted "compressed"; transformers '
            f"would load random weights",
        )
    yield from _format_problems(config, where)
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    used: set[str] = set()
    for name, module in checkpoint.modules.items():
        matching = matching_groups(groups, name)
        if module.is_quantized:
            used.update(matching)
            if len(matching) > 1:
                yield Problem(
                    name, f"targets of {' and '.join(matching)} match it; engines differ in which of them they take"
                )
            if _is_ignored(config, name):
                yield Problem(name, "is stored quantized and is in ignore")
            if not matching:
                yield Problem(name, "is stored quantized, and no target of config_groups matches it")
            elif module.format == "pack-quantized":
                yield from _packed_problems(checkpoint, module)
        elif is_linear(module) and matching and not _is_ignored(config, name):
            yield Problem(
                name, f"is stored dense, {matching[0]} matches it, and it is not in ignore; engines expect it packed"
            )
    class_groups = [key for key, group in groups.items() if "Linear" in (group.get("targets") or ())]
    if stored_head(checkpoint.modules) is None and class_groups and not _is_ignored(config, "lm_head"):
        yield Problem(where, f'{class_groups[0]} targets Linear, and the tied "lm_head" is not in ignore')
    for key in groups:
        if key not in used:
            yield Problem(f"{where}: {key}", "its targets match no quantized module", "warning")
    yield from _fused_name_problems(checkpoint, groups)
    yield from _loader_name_problems(checkpoint, groups)


def _loader_name_problems(checkpoint: Checkpoint, groups: Mapping[str, Any]) -> Iterator[Problem]:
    """Modules whose name in the loader's model falls in another group than their stored name."""
    if is_plain(checkpoint.config):
        return
    found: list[tuple[str, str]] = []
    for name, role in known_roles(checkpoint).items():
        module = checkpoint.modules[name]
        if role.loader == name or role.part != "text" or not module.is_quantized or ".experts." in name:
            continue
        if matching_groups(groups, role.loader) != matching_groups(groups, name):
            found.append((name, role.loader))
    if found:
        more = f" ({len(found)} modules like it)" if len(found) > 1 else ""
        yield Problem(
            found[0][0],
            f"its group's targets do not match {found[0][1]}, as transformers knows it; that would load random "
            f"weights{more}",
        )


def _format_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    formats = set()
    for key, group in groups.items():
        found = group.get("format")
        if found is None:
            yield Problem(f"{where}: {key}", "has no format, so that engines guess one", "warning")
        elif found == "mixed-precision":
            yield Problem(f"{where}: {key}", "format mixed-precision is for the top level only")
        else:
            formats.add(str(found))
    top = config.get("format")
    if len(formats) > 1 and top != "mixed-precision":
        yield Problem(where, f'format is {top!r}, wanted "mixed-precision" for groups in {", ".join(sorted(formats))}')
    if len(formats) == 1 and top is not None and top not in formats:
        yield Problem(where, f"format is {top!r}, wanted {formats.pop()!r} as in every group")


def matching_groups(groups: Mapping[str, Any], module: str) -> list[str]:
    """Every group with a target that matches, whatever engines do with several. A class name yields to a nearer match,
    since both engines ask names and patterns first."""
    near = [key for key, group in groups.items() if any(_matches(t, module) for t in group.get("targets") or ())]
    return near or [key for key, group in groups.items() if "Linear" in (group.get("targets") or ())]


def _matches(target: Any, module: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == module
    pattern = _compiled(target[3:])
    return pattern is not None and pattern.match(module)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Regex | None:
    try:
        return compile_regex(pattern, "target")
    except FormatError:
        return None  # another check says so


def _is_ignored(config: Mapping[str, Any], module: str) -> bool:
    return any(_matches(entry, module) or entry == "Linear" for entry in config.get("ignore") or ())


def _packed_problems(checkpoint: Checkpoint, module: StoredModule) -> Iterator[Problem]:
    try:
        scheme = checkpoint.scheme(module)
    except FormatError as error:
        yield Problem(module.name, str(error).removeprefix(f"{checkpoint.label}: "))
        return
    assert module.shape is not None, module.name
    out_features, in_features = module.shape
    groups = scheme.count_groups(in_features)
    wanted = {
        "weight_packed": (out_features, -(-in_features * scheme.bits // 32)),
        "weight_scale": (out_features, groups),
    }
    if not scheme.symmetric:
        wanted["weight_zero_point"] = (-(-out_features * scheme.bits // 32), groups)
    elif "weight_zero_point" in module.parts:
        yield Problem(module.name, "its group is symmetric, and a weight_zero_point is stored; vLLM cannot load that")
    for part, shape in wanted.items():
        info = module.parts.get(part)
        if info is None:
            yield Problem(module.name, f"{part} is missing, wanted {list(shape)}")
        elif tuple(info.shape) != shape:
            yield Problem(
                module.name,
                f"{part} is {list(info.shape)}; {scheme.bits} bits and {groups} groups a row, as its config group "
                f"says, are {list(shape)}",
            )


def _fused_name_problems(checkpoint: Checkpoint, groups: Mapping[str, Any]) -> Iterator[Problem]:
    """Patterns without a dot before the projection: `re:.*v_proj$` takes the whole of vLLM's qkv_proj."""
    for fused, members in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        parents = {name.rpartition(".")[0] for name in checkpoint.modules if name.endswith(f".{members[0]}")}
        for key, group in groups.items():
            for target in group.get("targets") or ():
                taken = [parent for parent in parents if _matches(target, f"{parent}.{fused}")]
                if taken and not all(_matches(target, f"{taken[0]}.{member}") for member in members):
                    yield Problem(
                        f"config.json: quantization_config: {key}",
                        f"target {target!r} also matches vLLM's {fused}, and not all of {', '.join(members)}",
                        "warning",
                    )


# ---- EXL2 and EXL3 ----


def _small_parts(module: StoredModule, large: Sequence[str]) -> dict[str, Tensor]:
    """Parts to check: those in `large` by dtype and shape only (no memory), the others as stored."""
    import torch
    from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

    return {
        part: torch.zeros((), dtype=TORCH_DTYPES[info.dtype]).expand(info.shape) if part in large else read_tensor(info)
        for part, info in module.parts.items()
    }


def exl2_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What is wrong with an EXL2 directory: its parts, dense modules and index."""
    from recompile.formats import exl2

    for module in checkpoint.modules.values():
        if module.format == "exl2":
            if "weight" in module.parts:
                yield Problem(module.name, "is stored twice, as .q_weight and as .weight; engines take the first")
            try:
                exl2.check_parts(module.name, _small_parts(module, ("q_weight", "q_scale", "weight")))
            except FormatError as error:
                yield Problem(module.name, _without_name(error, module.name))
    # Converters copy vision towers and projectors in the dtype of the source.
    foreign = [
        m
        for m in checkpoint.modules.values()
        if not m.is_quantized and not any(word in m.name for word in ("vision", "visual", "projector"))
    ]
    for message in exl2_config.dense_problems(foreign):
        yield Problem(message.split(" ")[0], message.partition(" ")[2])
    if (checkpoint.path / INDEX_NAME).exists():
        found = read_json(checkpoint.path / INDEX_NAME)
        listed = found.get("weight_map") if isinstance(found, Mapping) else None
        stored = {name: info.path.name for name, info in checkpoint.tensors.items()}
        if listed != stored:
            yield Problem(INDEX_NAME, "is stale, and does not list what is stored; remove it", "warning")


def exl3_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What is wrong with an EXL3 directory: its parts, fused modules and quantization_config.json."""
    from recompile.formats import exl3

    for module in checkpoint.modules.values():
        if module.format == "exl3":
            large = ("trellis", "weight") if exl3_config.is_linear(module) else ()
            parts = {part: value for part, value in _small_parts(module, large).items() if part != "weight"}
            if "weight" in module.parts:
                yield Problem(module.name, "is stored twice, as .trellis and as .weight; engines take the first")
            try:
                exl3.check_parts(module.name, parts)
            except FormatError as error:
                yield Problem(module.name, _without_name(error, module.name))
    for message in exl3_config.fusion_problems(checkpoint.modules):
        yield Problem(message.split(" ")[0], message.partition(" ")[2])
    for message in exl3_config.expert_warnings(checkpoint.modules):
        yield Problem(checkpoint.label, message, "warning")
    yield from storage_problems(checkpoint)


def mlx_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """config.json against the headers, by what mlx-lm reads of it."""
    for where, message, severity in mlx_config.config_problems(checkpoint.config, checkpoint.modules):
        yield Problem(where, message, severity)


def storage_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """quantization_config.json against the headers and against config.json."""
    path = checkpoint.path / exl3_config.STORAGE_FILE
    if not path.exists():
        yield Problem(path.name, "is missing; some EXL3 runtimes read it", "warning")
        return
    try:
        found = read_json(path)
    except CheckpointError as error:
        yield Problem(path.name, str(error).removeprefix(f"{path}: "))
        return
    if not isinstance(found, Mapping) or not isinstance(found.get("tensor_storage"), Mapping):
        yield Problem(path.name, "has no tensor_storage")
        return
    storage = found["tensor_storage"]
    wanted = exl3_config.tensor_storage(checkpoint.modules)
    for module in sorted(wanted.keys() | storage.keys()):
        have, want = storage.get(module), wanted.get(module)
        if want is None:
            if have.get("stored_tensors"):
                yield Problem(path.name, f"tensor_storage lists {module}, which is not stored")
        elif have is None:
            yield Problem(path.name, f"tensor_storage lacks {module}")
        else:
            for key in want:
                if have.get(key) != want[key]:
                    yield Problem(path.name, f"tensor_storage of {module}: {key} does not say what its headers say")
    for key in ("bits", "head_bits", "codebook"):
        if found.get(key) != checkpoint.quantization_config.get(key):
            yield Problem(
                path.name,
                f"{key} is {found.get(key)!r}, in config.json it is {checkpoint.quantization_config.get(key)!r}",
            )


def _without_name(error: Exception, module: str) -> str:
    return str(error).removeprefix(f"{module}: ").removeprefix(f"{module}.")


_OF_ONE_FORMAT: dict[str, Callable[[Checkpoint], Iterator[Problem]]] = {
    "exl2": exl2_problems,
    "exl3": exl3_problems,
    "mlx": mlx_problems,
}
