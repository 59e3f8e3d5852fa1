"""What an engine loads as one piece, and which candidates it takes: rules for a choice that can be loaded.

vLLM fuses (q,k,v), (gate,up), (w1,w3) and (q_a_proj, kv_a_proj_with_mqa), and reads
one scheme for all routed experts of a layer; SGLang loads
compressed-tensors through the same fused layers; exllamav3 asserts one K for all `gate` of a layer's experts, one for
all `up`, one for all `down`, and runs pairs of equal K faster, which is no condition;
llama.cpp stores all experts of one projection as one tensor. transformers decodes all routed experts of
a model with one scheme (other mixes load wrongly and silently); every other linear is on its own there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from recompile.costs import FUSED_SETS
from recompile.errors import RecompileError

_CODES = ("weight_packed", "qweight", "q_weight", "trellis", "weight")  # the part that holds a module's codes
_EXPERT = re.compile(r"^(.*\.experts)\.(?:\d+\.)?([^.]+)$")


@dataclass(frozen=True)
class Engine:
    """How one engine reads a model.

    fused:   projections beside each other share a source
    experts: "layer": all routed experts of a layer share one; "projection": all experts of a layer, per projection;
             "model": all experts of all layers
    widths:  format -> bits per weight of the packed codes that there are kernels for, None for all; a format that is
             not named is refused. None: formats are not looked at
    """

    name: str
    fused: bool
    experts: str
    widths: Mapping[str, frozenset[float] | None] | None


_INTEGERS = frozenset(float(bits) for bits in range(2, 9))
_HALVES = frozenset(half / 2 for half in range(2, 17))

# Group sizes, zero points and GPU generations narrow this further; `recompile --check` looks at the finished config.
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            fused=True,
            experts="layer",
            widths={
                "pack-quantized": _INTEGERS,  # on the CPU 4 only
                "float-quantized": None,
                "fp8-scale-inv": None,
                "nvfp4-pack-quantized": None,
                "nvfp4-modelopt": None,
                "mxfp4-pack-quantized": None,
                "mxfp8-quantized": None,
                "gptq": frozenset({4.0, 8.0}),
                "awq": frozenset({4.0}),
            },
        ),
        Engine("sglang", fused=True, experts="layer", widths=None),
        Engine("exllamav3", fused=False, experts="projection", widths={"exl3": _HALVES}),
        Engine("llama.cpp", fused=False, experts="projection", widths=None),
        Engine(
            "transformers",
            fused=False,
            experts="model",
            widths={
                "pack-quantized": _INTEGERS | {1.0},
                "int-quantized": None,
                "float-quantized": None,
                "nvfp4-pack-quantized": None,
                "mxfp4-pack-quantized": None,
                "mxfp8-quantized": None,
            },
        ),
    )
}


def find_engine(name: str) -> Engine:
    """Raises RecompileError for an engine that is not known."""
    if name not in ENGINES:
        raise RecompileError(f'--engine "{name}": wanted one of {", ".join(ENGINES)}')
    return ENGINES[name]


def is_routed_expert(module: str) -> bool:
    """Whether only some tokens run through it; shared experts are no routed ones."""
    return _EXPERT.match(module) is not None


def loaded_together(engine: Engine, modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Sets of modules that have to come from one source, each of two or more, in order of their first member."""
    sets: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        expert = _EXPERT.match(module)
        if expert is not None:
            key = {"layer": expert[1], "projection": f"{expert[1]}.{expert[2]}", "model": "experts"}[engine.experts]
        elif engine.fused and (fused := next((names for names in FUSED_SETS if leaf in names), None)):
            key = f"{parent}.{'+'.join(fused)}"
        else:
            continue
        sets.setdefault(key, []).append(module)
    return [tuple(members) for members in sets.values() if len(members) > 1]


def why_refused(engine: Engine, format_name: str, width: float) -> str | None:
    """Why the engine does not run a module of this format and width (bits per weight of its codes); None if it does."""
    if engine.widths is None or format_name == "dense":
        return None
    if format_name not in engine.widths:
        return f"{engine.name} does not read {format_name}"
    widths = engine.widths[format_name]
    if widths is not None and width not in widths:
        return f"{engine.name} has no {format_name} kernel for {width:g} bits"
    return None


class Part(Protocol):
    """A stored tensor's header."""

    @property
    def size_bytes(self) -> int: ...


class Stored(Protocol):
    """A module as a checkpoint stores it (recompile.checkpoint.StoredModule)."""

    @property
    def format(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def parts(self) -> Mapping[str, Part]: ...


def width_of(module: Stored) -> float:
    """Bits per weight of the packed codes alone, to the next half."""
    codes = next((module.parts[name] for name in _CODES if name in module.parts), None)
    return round(16 * codes.size_bytes / max(1, module.numel)) / 2 if codes is not None else 0.0
