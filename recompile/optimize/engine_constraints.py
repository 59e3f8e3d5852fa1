"""What an engine loads as one piece, and which candidates it takes: rules for a choice that can be loaded.

vLLM, SGLang and transformers are recompile.engines' matter. exllamav3 asserts one K for all `gate` of a layer's
experts, one for all `up`, one for all `down`, and runs pairs of equal K faster, which is no condition; llama.cpp
stores all experts of one projection as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from recompile.checkpoint.checkpoint import Checkpoint, StoredModule
from recompile.checkpoint.module_names import role_of
from recompile.errors import ArgumentError, FormatError
from recompile.formats import FORMATS
from recompile.formats.mlx_config import OF_HEADS
from recompile.merge import engine_rules as engines

OWN_FORMATS: Mapping[str, tuple[str, ...] | None] = {
    "exllamav3": tuple(spec.name for spec in FORMATS.values() if spec.engine == "exllamav3"),
    "llama.cpp": None,  # any GGUF type, and those that model_quantize can make
}
ENGINES = (*engines.ENGINES, *OWN_FORMATS)

_EXPERT = re.compile(r"^(.*\.experts)\.(?:\d+\.)?([^.]+)$")
_OF_HEAD = re.compile(rf"^(.*)\.({'|'.join(OF_HEADS)})\.\d+$")  # of mlx-lm's, one tensor for all heads


def check_engine(name: str) -> None:
    """Raises ArgumentError for an engine that is not known."""
    if name not in ENGINES:
        raise ArgumentError(f'{{engine}} "{name}": wanted one of {", ".join(ENGINES)}')


def is_routed_expert(module: str) -> bool:
    """Whether only some tokens run through it; shared experts are no routed ones."""
    return _EXPERT.match(module) is not None


def is_stacked(module: str) -> bool:
    """Whether engines may hold it in one tensor with others of its layer: a routed expert, or one head's map."""
    return is_routed_expert(module) or _OF_HEAD.match(module) is not None


def loaded_together(engine: str, modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Sets of modules that have to come from one source, each of two or more."""
    modules = list(modules)
    if engine in engines.ENGINES:
        return engines.tied_sets(engine, modules)
    sets: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        found = _EXPERT.match(module) or _OF_HEAD.match(module)
        if found is not None:
            sets.setdefault((found[1], found[2]), []).append(module)
    return [tuple(members) for members in sets.values() if len(members) > 1]


def why_refused(engine: str, checkpoint: Checkpoint, module: StoredModule) -> str | None:
    """Why the engine does not run a module as this checkpoint stores it; None if it does."""
    if not module.is_quantized:
        return None
    if engine in OWN_FORMATS:
        formats = OWN_FORMATS[engine]
        return f"{engine} does not read {module.format}" if formats and module.format not in formats else None
    try:
        kind = engines.kind_of(checkpoint, module)
    except FormatError as error:
        return str(error)
    if kind is None:
        return f"{engine} does not read {module.format}"
    return engines.why_not(engine, kind, role_of(module.name), expert=is_routed_expert(module.name))


def refusals(engine: str, checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """candidate label -> module -> why the engine refuses it. Headers and configs only."""
    return {
        label: {
            name: reason
            for name, module in checkpoint.modules.items()
            if (reason := why_refused(engine, checkpoint, module)) is not None
        }
        for label, checkpoint in checkpoints.items()
    }
