"""Which model types can be run, told from a config.json and the text of transformers' tables. Importing transformers to
ask the tables themselves takes seconds, which a refusal has not."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import no_table_of_names
from recompile.checkpoint.config_fields import config_place
from recompile.errors import CheckpointError, UnsupportedError
from recompile.gguf.config import config_of
from recompile.gguf.container import find_gguf, is_gguf, open_gguf
from recompile.io.files import read_json

# Tables of transformers' modeling_auto that list what makes text.
TEXT_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
# Listed there, and no model of the next token from tokens alone. docs/models.md says more of each.
OTHERWISE = {
    "diffusion_gemma": "denoises a canvas of random tokens and predicts no next one",
    "gemma4_assistant": "drafts from the keys and values of another model",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
    "idefics": "takes an image with every text",
    "pi0": "moves a robot and makes no text",
    "prophetnet": "predicts several tokens ahead, from states beside those of the tokens",
}
# Published under a name of their own, and the type of transformers' that they are.
PUBLISHED_AS = {"joyai_llm_flash": "deepseek_v3", "kimi_k2": "deepseek_v3"}


def type_in(config: Mapping[str, Any]) -> Any:
    """The `model_type` of a config.json as transformers calls it; whatever stands there where it does not know it."""
    found = config.get("model_type")
    return PUBLISHED_AS.get(found, found) if isinstance(found, str) else found


def check_model_type(model: Path | str) -> None:
    """Raise what running a model would raise for its type, where that can be told without importing transformers.

    A model that cannot be opened passes here: whoever opens it says what is wrong."""
    if "transformers" in sys.modules:
        return  # it may have been taught types, and is not waited for any more
    found = _config_at(Path(model).expanduser(), str(model))
    if found is not None:
        config, place = found
        check_told(config, place, _listed())


def check_told(config: Mapping[str, Any], place: str, listed: Listed | None) -> None:
    """`check_model_type` of a config.json by what transformers lists; passes what the lists do not tell."""
    model_type = type_in(config)
    if model_type is None and "gguf_architecture" in config:
        raise UnsupportedError(f"{place}: {no_table_of_names(config['gguf_architecture'])}")
    if not isinstance(model_type, str) or (listed is not None and model_type not in listed.types):
        raise unknown_type(model_type, place)
    if listed is not None:
        check_makes_text(model_type, model_type in listed.text, listed.is_pair(config), place)
    check_next_token(config, place)


def unknown_type(model_type: Any, place: str) -> CheckpointError:
    """For what is no type that transformers lists."""
    return CheckpointError(f"{place}: model_type {model_type!r} is not one that this transformers knows")


def check_makes_text(model_type: str, is_listed: bool, is_pair: bool, place: str) -> None:
    """Raise UnsupportedError for a type that is an encoder and a decoder, or is not listed among those of text."""
    if is_pair:
        raise UnsupportedError(
            f"{place}: model_type {model_type!r} is an encoder and a decoder; only models of one stack of layers can "
            f"be run"
        )
    if not is_listed:
        raise UnsupportedError(
            f"{place}: transformers has no model that makes text for model_type {model_type!r}; it cannot be run"
        )


def check_next_token(config: Mapping[str, Any], place: str) -> None:
    """Raise UnsupportedError for a model that does something else than to predict the next token from those before."""
    model_type = config.get("model_type")
    why = OTHERWISE.get(model_type) if isinstance(model_type, str) else None
    attention = config.get("attn_layers")
    if model_type == "reformer" and config.get("hash_seed") is None and (not attention or "lsh" in attention):
        why = "hashes with other random numbers in every run where config.json sets no hash_seed"
    if why is not None:
        raise UnsupportedError(f"{place}: model_type {model_type!r} {why}; it cannot be run")


def _config_at(path: Path, label: str) -> tuple[Mapping[str, Any], str] | None:
    """The config of a model directory or GGUF file, and where it stands; None where there is none to read."""
    try:
        file = path if is_gguf(path) else None
        if file is None and not any(path.glob("*.safetensors")):
            file = find_gguf(path)
        if file is not None:
            return config_of(open_gguf(file))[0], str(file)
        config = read_json(path / "config.json")
    except (CheckpointError, OSError):
        return None
    return (config, config_place(label)) if isinstance(config, dict) else None


# ---- transformers' tables as text ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """What the files of an installed transformers list, read without importing it.

    types: all model types, and perhaps other words; text: those that make text, likewise
    classes: type -> class of its config; folders: type -> folder of its files where that has another name
    """

    models: Path
    types: frozenset[str]
    text: frozenset[str]
    classes: Mapping[str, str]
    folders: Mapping[str, str]

    def is_pair(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of an encoder and a decoder; False also where the files do not tell."""
        default, forced = self._pairing(config["model_type"])
        return forced or bool(config.get("is_encoder_decoder", default))

    def _pairing(self, model_type: str) -> tuple[bool, bool]:
        """(default of `is_encoder_decoder`, whether the class of a type sets it whatever config.json says)."""
        folder = self.folders.get(model_type, model_type.replace("-", "_"))
        tree = _parsed(self.models / folder / f"configuration_{folder}.py")
        default = forced = False
        for found in tree.body if tree is not None else ():
            if isinstance(found, ast.ClassDef) and found.name == self.classes.get(model_type):
                for node in ast.walk(found):
                    value = getattr(node, "value", None)
                    if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Constant):
                        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                        default |= getattr(target, "id", "") == "is_encoder_decoder" and value.value is True
                        forced |= getattr(target, "attr", "") == "is_encoder_decoder" and value.value is True
        return default, forced


@lru_cache(maxsize=1)
def _listed() -> Listed | None:
    """Of the installed transformers; None where its files are laid out otherwise."""
    spec = find_spec("transformers")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return listed_at(Path(places[0]) / "models") if places else None


def listed_at(models: Path) -> Listed | None:
    """What the folder `models` of a transformers lists; None where its files are laid out otherwise."""
    auto = models / "auto"
    trees = [_parsed(auto / f"{name}.py") for name in ("auto_mappings", "configuration_auto")]
    of_types = [node for tree in trees if tree is not None for node in tree.body]
    of_models = _parsed(auto / "modeling_auto.py")
    classes = _pairs(of_types, "CONFIG_MAPPING_NAMES")
    tables = [_pairs(of_models.body if of_models is not None else (), name) for name in TEXT_TABLES]
    if not classes or not all(tables[:2]):
        return None
    text = frozenset(name for table in tables for name in table)
    folders = _pairs(of_types, "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    return Listed(models, frozenset(classes), text, classes, folders)


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None


def _pairs(body: Any, name: str) -> dict[str, str]:
    """Every pair of texts, as a tuple or an entry, in the statements of a file that fill a table: `name = ...` and
    `name.update(...)`. Of a tuple of names the first."""
    found: dict[str, str] = {}
    for statement in body:
        filled: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            filled = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            filled = [statement.target]
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            called = statement.value.func
            filled = [called.value] if isinstance(called, ast.Attribute) and called.attr == "update" else []
        if not any(isinstance(target, ast.Name) and target.id == name for target in filled):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                _keep(found, *node.elts)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if key is not None:
                        _keep(found, key, value)
    return found


def _keep(found: dict[str, str], key: ast.expr, value: ast.expr) -> None:
    if isinstance(value, (ast.Tuple, ast.List)) and value.elts:
        value = value.elts[0]
    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(key.value, str):
        found[key.value] = str(value.value)
