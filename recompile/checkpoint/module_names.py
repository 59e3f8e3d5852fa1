"""What the name of a module says (head, embedding or layer), and what a module is for (a role; model/roles.py).

Variants keep their roles in `recompile_roles.json`, so that a merge knows them without transformers. No torch here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recompile.errors import CheckpointError
from recompile.io.files import read_json

HEAD_NAMES = ("lm_head", "output", "embed_out")
EMBEDDING_NAMES = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings", "token_embd")
NUMBERS = re.compile(r"(?<=\.)(\d+)(?=\.|$)")  # of layers and experts
_WHOLE_NAMES = {"head": "head", "embed": "embedding"}  # DeepSeek's own; within a tower such a name means something else
_ROUTERS = ("gate", "router", "shared_expert_gate")  # asked only where transformers does not know the architecture


def role_of(module: str) -> str:
    """ "head", "embedding" or "layer": which bitrate a module counts in."""
    if module in _WHOLE_NAMES:
        return _WHOLE_NAMES[module]
    leaf = module.rpartition(".")[2]
    if leaf in HEAD_NAMES and not NUMBERS.search(module):  # BERT's layers have an `attention.output`
        return "head"
    return "embedding" if leaf in EMBEDDING_NAMES else "layer"


def head_in(modules: Collection[str]) -> str | None:
    """The output head among stored modules: the model's own, or that of the language model in it
    (`language_model.lm_head`); None where it is stored nowhere, as a tied one."""
    own = next((name for name in HEAD_NAMES if name in modules), None)
    return own or next((name for name in modules if name.endswith(".lm_head") and not NUMBERS.search(name)), None)


@dataclass(frozen=True)
class Role:
    """What a stored module is for.

    part:   "text" (what runs on tokens), "mtp" (multi-token prediction layers), "tower" (vision, audio), "unused"
    kind:   "linear" (a map that can be quantized), "router", "gate", "convolution", "embedding", "head", "vector",
            "projection", "parameter", "other"
    loader: its name in transformers' model, which configs are matched with; the stored name where it has none
    like:   for a linear map of an MTP layer: the last layer's module of its kind, whose inputs stand in for its own
    """

    part: str
    kind: str
    loader: str
    like: str | None = None

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.part if self.part != "text" else self.kind


def by_name(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...] | None], config: Mapping[str, Any]
) -> dict[str, Role]:
    """Roles by name and shape alone, for architectures that transformers does not know."""
    found = {}
    for name in names:
        shape, named = shapes[name] or (), role_of(name)
        kind = named if named != "layer" else "linear"
        if len(shape) < 2:
            kind = "vector"
        elif named == "layer" and name.rpartition(".")[2] in _ROUTERS:
            kind = "router"
        elif named == "layer" and (len(shape) != 2 or not re.search(r"\.\d+\.", name)):
            kind = "parameter"
        found[name] = Role("text", kind, name)
    return found


# ---- roles beside a checkpoint ---------------------------------------------------------------------------------------

ROLES_NAME = "recompile_roles.json"
_VERSION = 1


def template_of(name: str, numbers: list[str]) -> str | None:
    """A name with its numbers, which are some of `numbers` in their order, as places to fill with `format`; None where
    they are others."""
    made, at = "", 0
    for position, word in enumerate(NUMBERS.split(name)):
        if position % 2 == 0:
            made += word.replace("{", "{{").replace("}", "}}")
            continue
        while at < len(numbers) and numbers[at] != word:
            at += 1
        if at == len(numbers):
            return None
        made += f"{{{at}}}"
        at += 1
    return made


def dump_roles(roles: Mapping[str, Role]) -> str:
    """The file's text. Modules that differ in their numbers only are one entry; those that do not fit it follow."""
    common: dict[str, Counter[tuple[str, str, str]]] = {}
    for name, role in roles.items():
        template = template_of(role.loader, NUMBERS.findall(name))
        if template is not None:
            common.setdefault(NUMBERS.sub("#", name), Counter())[role.part, role.kind, template] += 1
    kinds = {kind: counts.most_common(1)[0][0] for kind, counts in common.items()}
    exceptions = {}
    for name, role in roles.items():
        kind = kinds.get(NUMBERS.sub("#", name))
        if kind is None or _filled(kind, name) != Role(role.part, role.kind, role.loader):
            exceptions[name] = (role.part, role.kind, role.loader)
    return json.dumps({"version": _VERSION, "kinds": kinds, "modules": exceptions}, indent=1) + "\n"


def _filled(kind: tuple[str, str, str], name: str) -> Role:
    return Role(kind[0], kind[1], kind[2].format(*NUMBERS.findall(name)))


def read_roles(directory: Path, names: Iterable[str]) -> dict[str, Role] | None:
    """The roles kept beside a checkpoint; None where none are, or not of all of `names`. Raises CheckpointError for a
    damaged file."""
    path = directory / ROLES_NAME
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        if content["version"] != _VERSION:
            return None
        kinds = {str(kind): (str(a), str(b), str(c)) for kind, (a, b, c) in content["kinds"].items()}
        found = {str(name): Role(str(a), str(b), str(c)) for name, (a, b, c) in content["modules"].items()}
        for name in names:
            if name not in found:
                kind = kinds.get(NUMBERS.sub("#", name))
                if kind is None:
                    return None
                found[name] = _filled(kind, name)
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a list of roles ({error!r}); it was damaged, remove it") from error


@dataclass(frozen=True)
class Dense:
    """Which modules are to stay dense, and which are quantized though their role says otherwise.

    keep, quantize: globs over module names (`*` crosses dots); where both match, a module is kept
    mtp, tower: "quantize" or "keep"
    """

    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    mtp: str = "quantize"
    tower: str = "keep"

    def why_dense(self, name: str, role: Role, shape: tuple[int, ...] | None) -> str | None:
        """Why a module stays dense, as a word or two that reports count by; None if it is to be quantized."""
        if _matches(self.keep, name):
            return "keep"
        if shape is not None and len(shape) == 2 and _matches(self.quantize, name):
            return None
        if role.kind != "linear" or role.part == "unused":
            return role.label if role.part in ("text", "unused") else f"{role.part} {role.kind}"
        chosen = {"mtp": self.mtp, "tower": self.tower}.get(role.part, "quantize")
        return role.part if chosen == "keep" else None


def _matches(globs: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(".*".join(map(re.escape, glob.split("*"))), name) for glob in globs)
