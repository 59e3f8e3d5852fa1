"""Is a checkpoint what it says it is? Three questions, each answered by reading, never by trusting:

verify              does a recompiled directory hold the bytes that its manifest, and its sources, say?
check_checkpoint    do headers, index and configs of any directory agree, as the engine of its format reads them?
check_same_weights  were the variants of an overlay made from the same weights?
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.arguments import Worded, respell
from recompile.checkpoint.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    GgufCheckpoint,
    OpenFiles,
    StoredModule,
    TensorInfo,
    open_checkpoint,
    read_json,
    read_tensor,
)
from recompile.checkpoint.coupled_modules import read_scaled_sets
from recompile.checkpoint.tied_head import find_tied_head, stored_head
from recompile.errors import CheckpointError, FormatError, MismatchError
from recompile.formats import FLOAT_DTYPES, FORMATS, exl2_config, exl3_config, mlx_config
from recompile.io.files import MARKER_NAME
from recompile.io.patterns import Regex, compile_regex
from recompile.merge import engine_rules as engines
from recompile.merge.configs import COMPRESSED_FORMATS, family_of, is_linear
from recompile.merge.left_dense import is_plain, known_roles
from recompile.merge.overlay import Overlay, Placement
from recompile.merge.write_gguf import HASHES_KEY, MAINLINE_ONLY, check_hashes
from recompile.merge.write_safetensors import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Step,
    WritePlan,
    default_workers,
    natural_key,
)

if TYPE_CHECKING:
    from torch import Tensor

# A block of a weight and of the same weight quantized twice, independently, to 2 bits still correlate at about 0.75
# (1 bit: 0.6); blocks of unrelated weights within 0.02 of zero, as they have thousands of elements. Anything between
# tells the two apart; 0.9, which suits 3 bits and more, would refuse honest 2-bit variants.
MIN_CORRELATION = 0.5
PROBED_MODULES = 24
BLOCK_ROWS = 128  # one rotation block of EXL3, four words of packed zero points, four paddings of EXL2
# Unquantized tensors pass through bfloat16 or float16 on their way (2^-8 relative covers one rounding to either and
# back), and through float16 as 1 + w in some converters (2^-11 of a value below 2).
NORM_RELATIVE, NORM_ABSOLUTE = 2.0**-8, 2.0**-10


@dataclass(frozen=True)
class Problem:
    """Something in a checkpoint that contradicts something else."""

    where: str  # a file or a module
    message: str
    severity: str = "error"  # "error": its engine fails or reads other weights; "warning": worth knowing

    def __str__(self) -> str:
        return self.spelled({})

    def spelled(self, names: Mapping[str, str]) -> str:
        """With other names for arguments that the message names."""
        return f"{self.where}: {respell(self.message, names)}"


# ---- verify ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read and found."""

    directory: str
    modules: int
    size_bytes: int
    compared_with_sources: int  # modules whose bytes were also read from their source
    notes: tuple[str, ...]  # why others were not
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)


def verify(out: str | os.PathLike[str], on_step: Callable[[Step], None] | None = None) -> VerifyReport:
    """Read a recompiled checkpoint again and compare every module's bytes with the manifest, and with the module's
    source where that is still there.

    on_step: called after every module, with bytes read so far

    Raises CheckpointError if the directory cannot be opened or has no manifest of ours; contradictions are reported.
    """
    opened = open_checkpoint(out)
    if isinstance(opened, GgufCheckpoint):
        return _verify_gguf(opened)
    manifest = _read_manifest(opened)
    listed: Mapping[str, Mapping[str, Any]] = manifest["modules"]
    one_by_one = any(modules & listed.keys() for modules, _ in opened.fused_blocks)  # as merges stack experts
    checkpoint = opened if one_by_one else opened.whole
    problems = check_checkpoint(out)
    for name in sorted(checkpoint.modules.keys() - listed.keys()):
        problems.append(Problem(name, f"is stored and not in {MANIFEST_NAME}"))
    for name in sorted(listed.keys() - checkpoint.modules.keys()):
        problems.append(Problem(name, f"is in {MANIFEST_NAME} and not stored"))
    stored = {name: module for name, module in checkpoint.modules.items() if name in listed}
    for name, module in stored.items():
        if module.format != listed[name].get("format"):
            problems.append(Problem(name, f"is {module.format}, the manifest says {listed[name].get('format')}"))
    sources, notes = _reachable_sources(manifest)
    originals: dict[str, StoredModule] = {}
    for name in stored:
        source = listed[name].get("source")
        if source not in sources or listed[name].keys() & {"decoded_from", "converted_from"}:
            continue
        original = sources[source].modules.get(name) or sources[source].whole.modules.get(name)
        if original is not None:
            originals[name] = original
        else:
            problems.append(Problem(name, f"is not in {source or 'the base'}, which it was taken from"))
    total = sum(module.size_bytes for module in (*stored.values(), *originals.values()))
    done = 0
    for name, digest in _hashes(stored.values()):
        done += stored[name].size_bytes
        if digest != listed[name].get("sha256"):
            problems.append(Problem(name, f"its bytes hash to {digest[:16]}, the manifest says {_short(listed[name])}"))
        if on_step:
            on_step(Step(name, done, total))
    for name, digest in _hashes(originals.values()):
        done += originals[name].size_bytes
        if digest != listed[name].get("sha256"):
            where = listed[name].get("source") or "the base"
            problems.append(Problem(name, f"its bytes in {where} hash to {digest[:16]}, not {_short(listed[name])}"))
        if on_step:
            on_step(Step(name, done, total))
    return VerifyReport(checkpoint.label, len(stored), total, len(originals), tuple(notes), tuple(problems))


def _gguf_problems(checkpoint: GgufCheckpoint) -> list[Problem]:
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


def _verify_gguf(checkpoint: GgufCheckpoint) -> VerifyReport:
    """A GGUF file against the hashes that a merge left in its keys."""
    found = check_hashes(checkpoint.path)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.label}: has no key {HASHES_KEY}, so there is nothing to verify it against; it was not merged "
            f"by recompile (recompile --check reads any file)"
        )
    problems = [
        Problem(name, "its bytes do not have the hash in the file's keys") for name, ok in found.items() if not ok
    ]
    note = "sources are compared when the file is written (recompile -i ... --verify)"
    size = checkpoint.size_bytes
    return VerifyReport(checkpoint.label, len(checkpoint.modules), size, 0, (note,), tuple(problems))


def _short(entry: Mapping[str, Any]) -> str:
    return str(entry.get("sha256"))[:16]


def _read_manifest(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.path / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.label}: has no {MANIFEST_NAME}, so there is nothing to verify it against; it was not written "
            f"by recompile (recompile --check reads any checkpoint)"
        )
    manifest = read_json(path)
    version = manifest.get("manifest_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION or not isinstance(manifest.get("modules"), dict):
        raise CheckpointError(f"{path}: is not a manifest of version {MANIFEST_VERSION} (found {version!r})")
    return manifest


def _reachable_sources(manifest: Mapping[str, Any]) -> tuple[dict[str | None, Checkpoint], list[str]]:
    """The checkpoints that the output was made from and that are still what they were, by `source` in the manifest."""
    found: dict[str | None, Checkpoint] = {}
    notes = []
    entries: dict[str | None, Any] = {None: manifest.get("base"), **(manifest.get("sources") or {})}
    for source, entry in entries.items():
        directory = entry.get("directory") if isinstance(entry, Mapping) else None
        if not isinstance(directory, str) or not Path(directory).is_dir():
            notes.append(f"{directory}: not found from here, so that its bytes were not compared")
            continue
        try:
            checkpoint = open_checkpoint(directory)
        except CheckpointError as error:
            notes.append(f"{error}; its bytes were not compared")
            continue
        if checkpoint.fingerprint != entry.get("fingerprint"):
            notes.append(f"{directory}: was changed since, so that its bytes were not compared")
            continue
        found[source] = checkpoint
    return found, notes


def _hashes(modules: Iterable[StoredModule]) -> Iterator[tuple[str, str]]:
    """(module, sha256 over its parts' bytes in part-name order), in order, read by several threads."""
    modules = list(modules)
    with ThreadPoolExecutor(default_workers()) as pool:
        yield from zip((module.name for module in modules), pool.map(hash_module, modules), strict=True)


def hash_module(module: StoredModule) -> str:
    """sha256 over the bytes of a module's parts, in part-name order, as in the manifest. Raises CheckpointError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for _, info in sorted(module.parts.items()):
        if info.is_scattered:
            with OpenFiles() as files:
                digest.update(files.read(info))
            continue
        try:
            with info.path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                left = info.size_bytes
                while left:
                    count = file.readinto(buffer[: min(left, CHUNK_BYTES)])
                    if not count:
                        raise CheckpointError(
                            f"{info.path}: ends inside tensor {info.name}; was it changed while open?"
                        )
                    digest.update(buffer[:count])
                    left -= count
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


# ---- check_checkpoint ------------------------------------------------------------------------------------------------


def check_checkpoint(directory: str | os.PathLike[str]) -> list[Problem]:
    """Every inconsistency of a finished checkpoint, as the engine of its format would meet it. Reads headers, configs
    and the small parts of quantized modules; imports torch for quantized ones.

    Raises nothing for a damaged checkpoint: a directory that cannot even be opened is one problem.
    """
    label = os.fspath(directory)
    try:
        checkpoint = open_checkpoint(directory)
        modules = checkpoint.modules
    except CheckpointError as error:
        return [Problem(label, str(error).removeprefix(f"{label}: "))]
    problems = [Problem(label, note.removeprefix(f"{label}: "), "warning") for note in checkpoint.notes]
    if isinstance(checkpoint, GgufCheckpoint):
        return problems + _gguf_problems(checkpoint)
    if (checkpoint.path / MARKER_NAME).exists() and not (checkpoint.path / MANIFEST_NAME).exists():
        problems.append(Problem(label, "is an unfinished output of recompile"))
    readers = [_general_problems]
    formats = {module.format for module in modules.values() if module.is_quantized}
    if formats & COMPRESSED_FORMATS and checkpoint.quantization_config.get("quant_method") == "compressed-tensors":
        readers.append(_compressed_problems)
    if "exl2" in formats:
        readers.append(_exl2_problems)
    if "exl3" in formats:
        readers.append(_exl3_problems)
    if "mlx" in formats:
        readers.append(_mlx_problems)
    for reader in readers:
        try:
            problems += reader(checkpoint)
        except CheckpointError as error:  # what stops one reader is a problem like the others
            problems.append(Problem(label, str(error).removeprefix(f"{label}: ")))
    return problems


def _general_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    families: dict[str, str] = {}
    for module in checkpoint.modules.values():
        if module.is_quantized:
            families.setdefault(family_of(checkpoint, module), module.name)
    method = checkpoint.quantization_config.get("quant_method")
    if len(families) > 1:
        listed = " and ".join(f"{family} ({name})" for family, name in families.items())
        yield Problem(checkpoint.label, f"holds {listed}; no engine loads these formats in one model")
    elif families and method is None:
        family = next(iter(families))
        severity = "warning" if family == "exl2" else "error"  # the EXL2 engine reads no field of it
        yield Problem(
            "config.json", f"has no quantization_config, and {families[family]} is stored as {family}", severity
        )
    elif families and not families.keys() & {method} and {method, *families} & {"exl2", "exl3"}:
        family = next(iter(families))
        yield Problem("config.json", f"quant_method is {method!r}, and {families[family]} is stored as {family}")
    elif not families and method is not None:
        yield Problem("config.json", f"has a quantization_config ({method}), and no module is stored quantized")
    yield from _head_problems(checkpoint)


def _head_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    architectures = checkpoint.config.get("architectures") or []
    causal = any(str(name).endswith("ForCausalLM") for name in architectures)
    tied_head = find_tied_head(checkpoint)
    if tied_head is not None:
        yield Problem("config.json", str(tied_head), "warning" if tied_head.is_copy else "error")
    if stored_head(checkpoint.modules) is None and causal and checkpoint.config.get("tie_word_embeddings") is False:
        yield Problem("config.json", "tie_word_embeddings is false, and no output head is stored")


# ---- engines ----


def check_engine(directory: str | os.PathLike[str], engine: str) -> list[Problem]:
    """What keeps vLLM, transformers or SGLang (see engines.py) from running a finished checkpoint. Raises nothing for
    a damaged one: `check_checkpoint` names that."""
    try:
        return engine_problems(open_checkpoint(directory), engine)
    except CheckpointError:
        return []


def engine_problems(checkpoint: Checkpoint, engine: str) -> list[Problem]:
    """What keeps an engine from running it, as far as headers and the model's classes tell. Raises CheckpointError."""
    found = [_as_problem(finding) for finding in engines.findings(engine, checkpoint)]
    return found + _left_out(checkpoint) if engine == "transformers" else found


def _left_out(checkpoint: Checkpoint) -> list[Problem]:
    """Modules that transformers passes over while loading, one line for each reason."""
    if checkpoint.quantization_config.get("quant_method") != "compressed-tensors":
        return []
    from recompile.model.loads import left_out_by_transformers

    reasons: dict[str, list[str]] = {}
    for name, why in left_out_by_transformers(checkpoint):
        reasons.setdefault(why, []).append(name)
    more = {why: f" ({len(names)} modules like it)" if len(names) > 1 else "" for why, names in reasons.items()}
    return [Problem(names[0], why + more[why]) for why, names in reasons.items()]


def loaders_that_fail(directory: str | os.PathLike[str]) -> list[Problem]:
    """A warning for every engine of the checkpoint's format that would not run it, with the first reason."""
    try:
        checkpoint = open_checkpoint(directory)
        if isinstance(checkpoint, GgufCheckpoint) or not set(checkpoint.formats) & COMPRESSED_FORMATS:
            return []
    except CheckpointError:
        return []
    warnings = []
    for engine in engines.ENGINES:
        errors = [found for found in check_engine(directory, engine) if found.severity == "error"]
        if errors:
            more = f"; {{engine}} {engine} lists {len(errors)} reasons" if len(errors) > 1 else ""
            told = Worded(f"{engine} does not run this: {errors[0].where}: {errors[0].message}{more}")
            warnings.append(Problem(os.fspath(directory), told, "warning"))
    return warnings


def check_plan(plan: WritePlan, engine: str) -> list[Problem]:
    """The same for a merge that is planned."""
    placed = {module.name: (module.placement.checkpoint, module.placement.stored) for module in plan.modules}
    converted = {
        module.name: engines.kind_of_group(module.conversion.format, module.conversion.group)
        for module in plan.modules
        if module.conversion is not None and module.conversion.group is not None
    }
    config = json.loads(plan.texts["config.json"])
    return [_as_problem(finding) for finding in engines.findings_of(engine, placed, config, converted)]


def _as_problem(finding: engines.Finding) -> Problem:
    return Problem(finding.where, finding.message, finding.severity)


# ---- compressed-tensors ----


def _compressed_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
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
        matching = _matching_groups(groups, name)
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
        if _matching_groups(groups, role.loader) != _matching_groups(groups, name):
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


def _matching_groups(groups: Mapping[str, Any], module: str) -> list[str]:
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


def _exl2_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
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


def _exl3_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
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
    yield from _storage_problems(checkpoint)


def _mlx_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    for where, message, severity in mlx_config.config_problems(checkpoint.config, checkpoint.modules):
        yield Problem(where, message, severity)


def _storage_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
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


# ---- same weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeReport:
    """What `check_same_weights` compared. Correlations are of a block of rows, source against base."""

    unquantized_tensors: int
    modules: tuple[str, ...]
    correlations: tuple[float, ...]

    @property
    def lowest(self) -> tuple[str, float] | None:
        """The module with the lowest correlation, and that correlation."""
        if not self.modules:
            return None
        return min(zip(self.modules, self.correlations, strict=True), key=lambda pair: pair[1])


def check_same_weights(overlay: Overlay, sample: int = PROBED_MODULES) -> ProbeReport:
    """Cheap evidence that the sources that an overlay takes modules from were made from the base's weights.

    Vectors that both store unquantized (norms) must agree within the rounding of 16-bit floats; of at most `sample`
    overridden modules, spread over depth, kind and source, a block of rows must correlate with the base's. This catches
    another model, another random start, torn or permuted weights; it does not tell a fine-tune with the same norms from
    its original. Modules that cannot be decoded here are left out, and those between which scales were moved (AWQ and
    SmoothQuant variants of model_quantize), which `build_overlay` keeps together.

    Raises MismatchError with the module and the figure, CheckpointError for values that are not finite.
    """
    used: dict[str, Checkpoint] = {}
    for placement in overlay.placements.values():
        if placement.source is not None:
            used.setdefault(placement.source, placement.checkpoint)
    compared = sum(_check_unquantized(overlay.base, source, label) for label, source in used.items())
    names, correlations = [], []
    for placement in _sampled(overlay, sample):
        figure = _correlation(overlay.base, placement)
        if figure is None:
            continue
        if figure < MIN_CORRELATION:
            raise MismatchError(
                f"{placement.source}: {placement.module} was not made from the weights of {overlay.base.label}: the "
                f"correlation of a block of its rows with the base's is {figure:.3f}, wanted above {MIN_CORRELATION}; "
                f"use variants of one model ({{probe=False}} skips this check)"
            )
        names.append(placement.module)
        correlations.append(figure)
    return ProbeReport(compared, tuple(names), tuple(correlations))


def _check_unquantized(base: Checkpoint, source: Checkpoint, label: str) -> int:
    """Compare every vector that both store dense; returns how many."""
    compared = 0
    scaled = _scaled_modules(base, source)
    for name, module in base.modules.items():
        other = source.modules.get(name)
        if other is None or other is module or module.is_quantized or other.is_quantized or name in scaled:
            continue
        left = module.parts.get("weight") or module.parts.get("")
        right = other.parts.get("weight") or other.parts.get("")
        if left is None or right is None or left.shape != right.shape or len(left.shape) != 1:
            continue
        if left.dtype not in FLOAT_DTYPES or right.dtype not in FLOAT_DTYPES:
            continue
        want, have = read_tensor(left).double(), read_tensor(right).double()
        _check_finite(want, base.label, left.name)
        _check_finite(have, label, right.name)
        apart = (want - have).abs()
        beyond = apart > NORM_RELATIVE * want.abs() + NORM_ABSOLUTE
        if bool(beyond.any()):
            raise MismatchError(
                f"{label}: {right.name} differs from {base.label}'s by up to {float(apart.max()):.3g} (in "
                f"{int(beyond.sum())} of {want.numel()} values by more than rounding), and both store it unquantized; "
                f"they are not builds of the same weights, or one has scales moved into its norms, as AWQ and "
                f"SmoothQuant do, and its modules fit no other build ({{probe=False}} skips this check)"
            )
        compared += 1
    return compared


def _scaled_modules(*checkpoints: Checkpoint) -> frozenset[str]:
    """Modules whose stored weights are scaled against the original's."""
    sets = (entry for checkpoint in checkpoints for entry in read_scaled_sets(checkpoint.path))
    return frozenset(name for entry in sets for name in entry.members)


def _check_finite(value: Tensor, label: str, tensor: str) -> None:
    if not bool(value.isfinite().all()):
        raise CheckpointError(f"{label}: {tensor} holds NaN or infinite values; this checkpoint is damaged")


def _sampled(overlay: Overlay, sample: int) -> list[Placement]:
    """At most about `sample` overridden modules: evenly from each source's, sorted by kind and then depth."""
    by_source: dict[str, list[Placement]] = {}
    scaled = _scaled_modules(*overlay.checkpoints)
    for placement in overlay.placements.values():
        base = overlay.base.modules.get(placement.module)
        if placement.source is None or base is None or placement.module in scaled:
            continue
        if _can_probe(base) and _can_probe(placement.stored):
            by_source.setdefault(placement.source, []).append(placement)
    chosen = []
    for placements in by_source.values():
        placements.sort(key=lambda p: (p.module.rpartition(".")[2], natural_key(p.module)))
        count = min(len(placements), max(1, sample // len(by_source)))
        chosen += [placements[(2 * number + 1) * len(placements) // (2 * count)] for number in range(count)]
    return chosen


def _can_probe(module: StoredModule) -> bool:
    return module.shape is not None and len(module.shape) == 2 and FORMATS[module.format].runnable


def _correlation(base: Checkpoint, placement: Placement) -> float | None:
    """Pearson correlation of one block of rows; None where one of the two is constant."""
    ours, theirs = base.modules[placement.module], placement.stored
    assert ours.shape is not None, ours.name
    assert theirs.shape is not None, theirs.name
    common = min(ours.shape[0], theirs.shape[0])
    first = max(0, common - BLOCK_ROWS) // 2 // BLOCK_ROWS * BLOCK_ROWS
    columns = min(ours.shape[1], theirs.shape[1])
    rows = min(BLOCK_ROWS, common - first)
    want = row_block(base, ours, first)[:rows, :columns].double()
    have = row_block(placement.checkpoint, theirs, first)[:rows, :columns].double()
    _check_finite(want, base.label, ours.name)
    _check_finite(have, str(placement.source), theirs.name)
    want, have = want - want.mean(), have - have.mean()
    scale = float(want.norm() * have.norm())
    return float((want * have).sum()) / scale if scale > 0 else None


def row_block(checkpoint: Checkpoint, module: StoredModule, first: int) -> Tensor:
    """Rows first .. first+BLOCK_ROWS (fewer at the end) of a module's dense weight, decoding little more than those.

    first: a multiple of BLOCK_ROWS. Raises FormatError as decoding does.
    """
    assert module.shape is not None, module.name
    last = min(first + BLOCK_ROWS, module.shape[0])
    parts = module.parts
    if isinstance(checkpoint, GgufCheckpoint):
        place = checkpoint.places.get(module.dense_name)
        if place is not None and place.moves_rows:  # rows stand in another order in the file
            return checkpoint.load(module.dense_name)[first:last]
        if module.is_quantized:
            return checkpoint.decode(module, {"weight": read_tensor(_rows_of(parts["weight"], first, last))})
    if not module.is_quantized and parts["weight"].is_scattered:
        return read_tensor(parts["weight"])[first:last]
    if not module.is_quantized:
        return read_tensor(_rows_of(parts["weight"], first, last))
    if module.format == "pack-quantized":
        import torch

        scheme = checkpoint.scheme(module)
        taken = {part: read_tensor(_rows_of(parts[part], first, last)) for part in ("weight_packed", "weight_scale")}
        taken["weight_shape"] = torch.tensor([last - first, module.shape[1]])
        if "weight_zero_point" in parts:  # packed along the rows: BLOCK_ROWS are whole words
            words = (first * scheme.bits // 32, -(-last * scheme.bits // 32))
            taken["weight_zero_point"] = read_tensor(_rows_of(parts["weight_zero_point"], *words))
        return checkpoint.decode(module, taken)
    whole = {part: read_tensor(info) for part, info in parts.items() if part != "bias"}
    if module.format not in ("exl2", "exl3"):
        return checkpoint.decode(module, whole)[first:last]
    if module.format == "exl2":
        whole["q_weight"] = whole["q_weight"][:, first:last].contiguous()
        whole["q_scale"] = whole["q_scale"][:, first // 8 : last // 8].contiguous()
    else:
        whole["trellis"] = whole["trellis"][:, first // 16 : last // 16].contiguous()
        if "svh" in whole:
            whole["svh"] = whole["svh"][first:last]
        if "sv" in whole:
            whole["sv"] = whole["sv"][first // 16 : last // 16]
    return checkpoint.decode(module, whole)


def _rows_of(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """The header of rows first..last of a stored tensor."""
    row_bytes = info.size_bytes // max(1, info.shape[0])
    last = min(last, info.shape[0])
    return TensorInfo(
        info.name,
        info.dtype,
        (last - first, *info.shape[1:]),
        info.path,
        info.offset + first * row_bytes,
        (last - first) * row_bytes,
    )
