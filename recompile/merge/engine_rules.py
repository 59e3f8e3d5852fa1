"""What vLLM, transformers and SGLang run, as a table of rules over schemes. Headers and configs only; no torch.

    findings(engine, checkpoint)           everything that keeps the engine from running a checkpoint
    kind_of(checkpoint, module)            how a module is stored, as far as an engine's choice of kernel depends on it
    why_not(engine, kind)                  why the engine cannot run such a module; None if it can
    tied_sets(engine, modules)             modules that must share one kind (fused projections, experts)
    problems_of(engine, kinds, config)     everything that is wrong with a whole mix

Rules are those of vLLM 0.33 and transformers 5.17 to 5.24 with compressed-tensors 0.20 (run on a CPU: transformers;
read from source: vLLM, SGLang). "error": the engine refuses, crashes, or computes other weights; "warning": some
hardware or some versions only.
"""

from __future__ import annotations

import importlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, StoredModule
from recompile.checkpoint.module_names import role_of
from recompile.costs import fused_sets
from recompile.errors import FormatError
from recompile.formats import FORMATS, compressed_tensors
from recompile.formats.schemes import Scheme

ENGINES = ("vllm", "transformers", "sglang")
# Engines with a loader of their own, whose rules are not about schemes: the file beside this one that has them, with
# source and version, and the engine's name in the rows of FORMATS
LOADERS: Mapping[str, tuple[str, str]] = {"mlx": ("mlx_loader", "mlx-lm")}
# Engines that find each module's scheme in its own tensors: nothing is matched, so nothing can be matched wrongly. What
# they load beside their own format is in the second place.
SELF_TOLD: Mapping[str, frozenset[str]] = {
    "llama.cpp": frozenset(),
    "exllamav2": frozenset({"gptq"}),
    "exllamav3": frozenset(),
}
CPU = "vllm-cpu"  # vLLM with the kernels of its CPU backend
CHECKED_ENGINES = ("vllm", CPU, "sglang", "transformers", *LOADERS, *SELF_TOLD)

_MARLIN_COLUMNS = (None, 32, 64, 128)
_EXPERT = re.compile(r"^(.*?\.experts)\.(\d+)\.(.+)$|^(.*?\.experts)\.([a-z]\w*)$")


@dataclass(frozen=True)
class Kind:
    """How one quantized module is stored and run. Two modules of one kind need the same kernel.

    family:    quant_method, e.g. "compressed-tensors", "gptq"
    format:    a key of FORMATS
    type:      "int" or "float"
    strategy:  tensor, channel, group, block or tensor_group
    columns:   that share a scale in groups and blocks
    inputs:    quantization of the inputs, e.g. "int8 token"; None: kept
    act_order: columns of a group are scattered (a real g_idx)
    layout:    of GPTQ and AWQ: checkpoint_format
    """

    family: str
    format: str
    bits: int
    type: str
    strategy: str
    columns: int | None
    symmetric: bool
    inputs: str | None = None
    act_order: bool = False
    layout: str = ""

    def __str__(self) -> str:
        size = f"-g{self.columns}" if self.strategy == "group" and self.type == "int" else f" {self.strategy}"
        text = {
            "nvfp4-pack-quantized": "nvfp4",
            "mxfp4-pack-quantized": "mxfp4",
            "mxfp6-pack-quantized": "mxfp6",
            "mxfp8-quantized": "mxfp8",
            "float-quantized": f"fp8{size}",
        }.get(self.format, f"{self.type}{self.bits}{size}{'' if self.symmetric else ' asymmetric'}")
        family = "" if self.family == compressed_tensors.QUANT_METHOD else f" ({self.layout or self.family})"
        order = " in activation order" if self.act_order else ""
        return f"{text}{order}{family}" + (f" with {self.inputs} inputs" if self.inputs else "")


@dataclass(frozen=True)
class Finding:
    """Something that an engine does not run, or not everywhere. where: a module, or a file."""

    where: str
    message: str
    severity: str = "error"


# ---- kinds -----------------------------------------------------------------------------------------------------------


def kind_of_scheme(scheme: Scheme) -> Kind:
    """The kind of modules that `model_quantize --scheme` makes."""
    return _compressed_kind(scheme.format, scheme.weights, scheme.input_activations)


def kind_of_group(fmt: str, group: Mapping[str, Any]) -> Kind:
    """The kind of modules that a compressed-tensors config group describes."""
    return _compressed_kind(fmt, group["weights"], group.get("input_activations"))


def kind_of(checkpoint: Checkpoint, module: StoredModule) -> Kind | None:
    """The kind of a stored module; None if it is dense or its family (EXL2, EXL3, GGUF) has an engine of its own.

    Raises FormatError where the config does not describe the module.
    """
    if not module.is_quantized:
        return None
    made = checkpoint.made_group(module.name)
    if made is not None:
        return kind_of_group(module.format, made)
    family = str(checkpoint.quantization_config.get("quant_method") or "")
    if family == compressed_tensors.QUANT_METHOD:
        group = compressed_tensors.group_for(checkpoint, module)
        return _compressed_kind(module.format, group["weights"], group.get("input_activations"))
    if module.format in ("gptq", "awq"):
        return _gptq_kind(checkpoint, module, family or module.format)
    if module.format in ("float-quantized", "fp8-scale-inv"):
        block = checkpoint.quantization_config.get("weight_block_size")
        columns = int(block[1]) if isinstance(block, Sequence) and module.format == "fp8-scale-inv" else None
        return Kind(family, module.format, 8, "float", "block" if columns else "channel", columns, True)
    if module.format == "nvfp4-modelopt":
        return Kind(family, module.format, 4, "float", "tensor_group", 16, True)
    return None


def _compressed_kind(fmt: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Kind:
    size, block, strategy = weights.get("group_size"), weights.get("block_structure"), weights.get("strategy")
    if strategy is None:
        strategy = "block" if block else "tensor" if size is None else "channel" if size == -1 else "group"
    columns = int(size) if isinstance(size, int) and size > 0 and strategy != "channel" else None
    if strategy == "block" and block:
        columns = int(block.split("x")[1]) if isinstance(block, str) else int(block[1])
    act_order = weights.get("actorder") in ("group", "dynamic", True)
    return Kind(
        compressed_tensors.QUANT_METHOD,
        fmt,
        int(weights.get("num_bits") or 8),
        str(weights.get("type") or "int"),
        str(strategy),
        columns,
        weights.get("symmetric") is not False,
        _describe_inputs(inputs),
        act_order,
    )


def _describe_inputs(inputs: Mapping[str, Any] | None) -> str | None:
    if not inputs:
        return None
    name = "fp" if inputs.get("type") == "float" else "int"
    size = f" {inputs['group_size']}" if inputs.get("group_size") else ""
    return f"{name}{inputs.get('num_bits', 8)} {inputs.get('strategy') or 'tensor'}{size}"


def _gptq_kind(checkpoint: Checkpoint, module: StoredModule, family: str) -> Kind:
    config = checkpoint.quantization_config
    if module.format == "awq":
        size = config.get("group_size", config.get("q_group_size"))
        columns = None if size in (None, -1) else int(size)
        symmetric = config.get("zero_point") is False or config.get("sym") is True
        return Kind(family, "awq", 4, "int", "group" if columns else "channel", columns, symmetric, layout="awq")
    from recompile.formats.gptq import read_scheme

    scheme = checkpoint.scheme(module) if family != "gptq" else read_scheme(config, module.name)
    return Kind(
        family,
        "gptq",
        scheme.bits,
        "int",
        "group" if scheme.group_size else "channel",
        scheme.group_size,
        scheme.symmetric is not False,
        act_order=not has_trivial_order(checkpoint, module, scheme.group_size),
        layout=scheme.layout,
    )


def has_trivial_order(checkpoint: Checkpoint, module: StoredModule, group_size: int | None) -> bool:
    """Whether column i is in group i // group_size, as readers without g_idx assume. Reads g_idx where there is one."""
    info = module.parts.get("g_idx") or module.parts.get("weight_g_idx")
    if info is None or group_size is None:
        return True
    found = array("q" if info.dtype == "I64" else "i")
    found.frombytes(checkpoint.read_bytes(info))
    unset = info.name.endswith("weight_g_idx") and all(group == -1 for group in found)
    return unset or all(group == column // group_size for column, group in enumerate(found))


# ---- rules for one module --------------------------------------------------------------------------------------------


def why_not(engine: str, kind: Kind, role: str = "layer", *, expert: bool = False) -> str | None:
    """Why an engine cannot run modules of a kind; None if it can. role: "layer", "head" or "embedding".

    Raises ValueError for an engine without rules about schemes.
    """
    if engine not in _RULES:
        raise ValueError(f"engine {engine!r}: wanted one of {', '.join(_RULES)}")
    return _RULES[engine](kind, role, expert)


def _vllm(kind: Kind, role: str, expert: bool) -> str | None:
    if kind.family == "gptq" or kind.format in ("gptq", "awq"):
        return _vllm_gptq(kind)
    if kind.family != compressed_tensors.QUANT_METHOD:
        return None
    if kind.act_order:
        return "vLLM dropped activation order (weight_g_idx); re-quantize without it"
    if role == "embedding" and (kind.format != "pack-quantized" or not kind.symmetric):
        return "vLLM runs quantized embeddings only as symmetric pack-quantized integers"
    if kind.format == "pack-quantized" and not 2 <= kind.bits <= 8:
        return f"vLLM has kernels for 2 to 8 bits, not {kind.bits}"
    if kind.format == "int-quantized":
        if kind.inputs is None:
            return "vLLM refuses int8 weights alone as int-quantized; store them as pack-quantized (scheme w8a16)"
        if kind.strategy not in ("channel", "tensor") or kind.inputs.split(" ")[1] not in ("token", "tensor"):
            return "vLLM's int8 kernels want one weight scale a row or tensor and one input scale a token or tensor"
    if kind.format == "float-quantized" and kind.strategy not in ("tensor", "channel", "block"):
        return f"vLLM has no fp8 kernel with one scale a {kind.strategy}"
    if kind.format == "nvfp4-pack-quantized" and kind.inputs not in (None, "fp4 tensor_group 16"):
        return f"vLLM runs nvfp4 weights alone or with nvfp4 inputs, not with {kind.inputs}"
    if kind.format == "mxfp6-pack-quantized":
        return "vLLM has no mxfp6 in its compressed-tensors loader"
    return None


def _vllm_gptq(kind: Kind) -> str | None:
    if kind.layout == "gptq_p":
        return "vLLM does not know the planar layout gptq_p"
    if kind.format == "awq":
        return None
    if kind.bits not in (4, 8):
        return f"vLLM's GPTQ kernels have 4 and 8 bits, not {kind.bits}; as compressed-tensors it runs"
    if not kind.symmetric:
        return "vLLM's GPTQ kernels are symmetric; as compressed-tensors it runs"
    if kind.act_order:
        return "vLLM refuses activation order (a real g_idx)"
    if kind.columns not in _MARLIN_COLUMNS:
        return f"vLLM's GPTQ kernels have groups of 32, 64, 128 or the whole row, not {kind.columns}"
    return None


def _vllm_cpu(kind: Kind, role: str, expert: bool) -> str | None:
    """vllm-cpu 0.32.0, run with a small model of every scheme on a processor with AMX."""
    refused = _vllm(kind, role, expert)
    if refused is not None:
        return refused
    if kind.family != compressed_tensors.QUANT_METHOD:
        return None if kind.bits == 4 else f"vLLM's CPU backend has no kernel for {kind.bits} bits of this kind"
    if kind.format == "pack-quantized" and (kind.bits != 4 or kind.inputs):
        return "vLLM's CPU backend has kernels for packed integers of 4 bits without quantized inputs alone"
    runs_inputs = kind.format == "float-quantized" and kind.inputs is not None and kind.strategy != "block"
    if kind.format not in ("pack-quantized", "int-quantized") and not runs_inputs:
        return "vLLM's CPU backend has no kernel for it; of fp8 it runs weights with fp8 inputs, of one scale a row"
    return None


def _transformers(kind: Kind, role: str, expert: bool) -> str | None:
    if role == "embedding":
        return "transformers cannot load a quantized embedding"
    if kind.format in ("gptq", "awq"):
        if kind.layout == "gptq_p":
            return "transformers refuses the planar layout gptq_p"
        if role == "head":
            return "transformers leaves a quantized GPTQ or AWQ head random, with a load report only"
        return None
    if kind.family != compressed_tensors.QUANT_METHOD:
        return None
    if kind.act_order:
        return "compressed-tensors 0.20 refuses activation order (weight_g_idx)"
    if kind.format == "pack-quantized" and not kind.symmetric:
        return "transformers 5.23 and 5.24 fail on asymmetric packed integers (the shape of the zero points)"
    if expert:
        if kind.format == "nvfp4-pack-quantized":
            return "transformers drops the global scale of nvfp4 experts, silently"
        if not kind.symmetric or kind.format == "int-quantized" or kind.strategy == "block":
            return "transformers cannot load experts that are asymmetric, unpacked int8 or fp8 in blocks"
    return None


def _sglang(kind: Kind, role: str, expert: bool) -> str | None:
    if kind.family == "gptq" or kind.format in ("gptq", "awq"):
        return _vllm_gptq(kind)  # the same kernels
    if kind.family != compressed_tensors.QUANT_METHOD:
        return None
    if kind.act_order:
        return "activation order (weight_g_idx) is gone from current kernels"
    if role == "embedding":
        return "SGLang has no quantized embedding"
    if kind.format == "pack-quantized" and (kind.bits not in (4, 8) or not kind.symmetric):
        return "SGLang's packed integers are symmetric with 4 or 8 bits"
    if kind.format == "int-quantized" and kind.inputs is None:
        return "SGLang has no int8 weights alone as int-quantized; store them as pack-quantized (scheme w8a16)"
    if kind.format == "float-quantized" and kind.strategy not in ("tensor", "channel", "block"):
        return f"SGLang has no fp8 kernel with one scale a {kind.strategy}"
    if kind.format == "mxfp6-pack-quantized":
        return "SGLang has no mxfp6"
    return None


_RULES: Mapping[str, Callable[[Kind, str, bool], str | None]] = {
    "vllm": _vllm,
    CPU: _vllm_cpu,
    "transformers": _transformers,
    "sglang": _sglang,
}


def note_on(engine: str, kind: Kind) -> str | None:
    """What limits a kind that the engine runs: hardware, dtype."""
    if engine == "vllm" and kind.format in ("pack-quantized", "gptq"):
        if kind.inputs and kind.inputs.startswith("fp8"):
            return "int4 with fp8 inputs runs on compute capability 9.0 only"
        marlin = kind.columns in _MARLIN_COLUMNS and (kind.bits == 4 or (kind.bits == 8 and kind.symmetric))
        if not marlin:
            return f"{kind} goes to the Humming kernels, on CUDA only"
    if engine == "vllm" and kind.format == "mxfp4-pack-quantized":
        return "mxfp4 wants compute capability 8.0"
    if engine == "transformers" and kind.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"):
        return f"{kind} loads in bfloat16 only (float32 and float16 stop at the first product)"
    return None


# ---- rules for a mix -------------------------------------------------------------------------------------------------


def tied_sets(engine: str, modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Sets of two and more modules that must share one kind, and for nvfp4 one global scale: the projections that the
    engine runs as one matrix, the experts of a layer (transformers: of the whole model)."""
    modules = list(modules)
    plain = [name for name in modules if not _EXPERT.match(name)]
    sets = [] if engine == "transformers" else [members for members in fused_sets(plain) if len(members) > 1]
    experts: dict[str, list[str]] = {}
    for name in modules:
        found = _EXPERT.match(name)
        if found:
            experts.setdefault("" if engine == "transformers" else (found[1] or found[4]), []).append(name)
    return [*sets, *(tuple(members) for members in experts.values() if len(members) > 1)]


def problems_of(
    engine: str,
    kinds: Mapping[str, Kind | None],
    *,
    tied_head: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Finding]:
    """Everything that keeps an engine from running a model whose modules are stored as `kinds` (None: dense).

    kinds:  all linear maps, the head and the embedding
    config: the `quantization_config` that is or will be written
    """
    notes: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind is None:
            continue
        why = why_not(engine, kind, role_of(name), expert=_EXPERT.match(name) is not None)
        if why is not None:
            reasons.setdefault(f"{kind}: {why}", []).append(name)
        note = note_on(engine, kind)
        if note is not None:
            notes.setdefault(note, []).append(name)
    for message, names in reasons.items():
        yield Finding(names[0], message + _others(names))
    for message, names in notes.items():
        yield Finding(names[0], message + _others(names), "warning")
    broken: dict[str, list[str]] = {}
    for members in tied_sets(engine, kinds):
        found = {kinds[name] for name in members}
        if len(found) > 1:
            listed = " and ".join(sorted(str(kind) if kind else "dense" for kind in found))
            broken.setdefault(listed, []).append(members[0])
    what = {
        "vllm": "vLLM runs fused projections, and the experts of a layer, with one scheme",
        CPU: "vLLM runs fused projections, and the experts of a layer, with one scheme",
        "sglang": "SGLang runs fused projections, and the experts of a layer, with one scheme",
        "transformers": "transformers decodes all experts with one scheme, silently",
    }[engine]
    for listed, names in broken.items():
        yield Finding(names[0], f"{listed} in one set; {what}{_others(names, 'sets')}")
    if engine == "transformers":
        yield from _transformers_mix(kinds, tied_head, config or {})


def _transformers_mix(
    kinds: Mapping[str, Kind | None], tied_head: bool, config: Mapping[str, Any]
) -> Iterator[Finding]:
    heads = [name for name, kind in kinds.items() if kind is not None and role_of(name) == "head"]
    if heads and tied_head:
        yield Finding(heads[0], "is quantized and the embeddings are tied; transformers stops with an error")
    quantized = {kind for kind in kinds.values() if kind is not None}
    if config.get("quant_method") == "gptq" and (config.get("dynamic") or len(quantized) > 1):
        yield Finding("config.json", "transformers ignores GPTQ's dynamic rules: other bits or skipped modules break")


def _others(names: Sequence[str], what: str = "modules") -> str:
    return f" ({len(names)} {what} like it)" if len(names) > 1 else ""


def findings(engine: str, checkpoint: Checkpoint) -> list[Finding]:
    """Everything that keeps an engine from running a finished checkpoint."""
    if engine in SELF_TOLD:
        return list(_foreign(engine, checkpoint))
    if engine in LOADERS:
        return list(importlib.import_module(f"recompile.merge.{LOADERS[engine][0]}").findings(checkpoint))
    placed = {name: (checkpoint, module) for name, module in checkpoint.modules.items()}
    return findings_of(engine, placed, checkpoint.config)


def _foreign(engine: str, checkpoint: Checkpoint) -> Iterator[Finding]:
    """What an engine of one format does not load: it reads each tensor's own type, bits and shapes."""
    if isinstance(checkpoint, GgufCheckpoint):
        if FORMATS["gguf"].engine != engine:
            yield Finding(checkpoint.label, f"is a GGUF file, which {engine} does not load")
            return
        for name, tensor in checkpoint.file.tensors.items():
            if tensor.type.fork:
                yield Finding(name, f"stored as {tensor.type.name}; {engine} does not know the type and stops")
        return
    if FORMATS["gguf"].engine == engine:
        yield Finding(checkpoint.label, f"is no GGUF file; {engine} loads nothing else")
        return
    for name, module in checkpoint.modules.items():
        if not module.is_quantized or FORMATS[module.format].engine == engine:
            continue
        is_taken = module.format in SELF_TOLD[engine] and checkpoint.scheme(module).bits == 4
        if not is_taken:
            yield Finding(name, f"stored as {module.format}; {engine} does not load it")


def findings_of(
    engine: str,
    placed: Mapping[str, tuple[Checkpoint, StoredModule]],
    config: Mapping[str, Any],
    converted: Mapping[str, Kind] | None = None,
) -> list[Finding]:
    """`problems_of` for modules as their checkpoints store them, and nvfp4 sets with several global scales.

    placed:    module -> (where it comes from, how it is stored there)
    config:    config.json as it is or will be
    converted: kinds of modules that a merge stores in another form
    """
    converted = converted or {}
    kinds: dict[str, Kind | None] = {}
    found: list[Finding] = []
    for name, (checkpoint, module) in placed.items():
        if engine in SELF_TOLD and module.is_quantized and FORMATS[module.format].engine != engine:
            return [Finding(name, f"is stored as {module.format}, which {engine} does not load")]
        if engine in SELF_TOLD:
            continue
        if engine in LOADERS and module.is_quantized and FORMATS[module.format].engine != LOADERS[engine][1]:
            return [Finding(name, f"is stored as {module.format}, which {LOADERS[engine][1]} does not load")]
        if engine in LOADERS:
            continue
        if FORMATS[module.format].engine is not None:
            return [Finding(name, f"is stored as {module.format}, which {engine} does not load")]
        if module.shape is None or len(module.shape) < 2:
            continue
        try:
            kinds[name] = converted.get(name) or kind_of(checkpoint, module)
        except FormatError as error:
            found.append(Finding(name, str(error).removeprefix(f"{checkpoint.label}: ")))
    if engine in LOADERS or engine in SELF_TOLD:
        return found
    quantization = config.get("quantization_config")
    found += problems_of(
        engine,
        kinds,
        tied_head=bool(config.get("tie_word_embeddings")),
        config=quantization if isinstance(quantization, Mapping) else None,
    )
    if engine != "transformers":
        found += _global_scale_findings(placed)
    return found


def _global_scale_findings(placed: Mapping[str, tuple[Checkpoint, StoredModule]]) -> Iterator[Finding]:
    nvfp4 = [name for name, (_, module) in placed.items() if module.format == "nvfp4-pack-quantized"]
    for members in fused_sets(nvfp4):
        values = {placed[name][0].read_bytes(placed[name][1].parts["weight_global_scale"]) for name in members}
        if len(values) > 1:
            leaves = ", ".join(name.rpartition(".")[2] for name in members)
            yield Finding(
                members[0].rpartition(".")[0],
                f"{leaves} have {len(values)} weight_global_scale values; engines take the largest for all of them",
                "warning",
            )
