"""An override file to a Recipe: YAML, its lines, and everything that may be wrong with it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from recompile.errors import RecipeError
from recompile.formats import mlx_config
from recompile.io.files import read_bytes
from recompile.recipe.messages import (
    Place,
    check_pattern,
    is_scalar,
    line_of,
    nearest_key,
    quote,
    show,
    show_typed,
    unknown_source,
)
from recompile.recipe.other_tools import read_other
from recompile.recipe.precedence import Recipe
from recompile.recipe.spelling import TEXT_TAG, describe_spec
from recompile.recipe.values import MADE_KINDS, MADE_SETTINGS, Override, Source, SourceId

_SOURCE_KEYS = ("id", "model_dir", "note", *MADE_KINDS, *MADE_SETTINGS)
_OVERRIDE_KEYS = ("key", "source", "note")
_TOP_KEYS = ("sources", "overrides", "base", "budget", "provenance")

_MERGE_TAG = "tag:yaml.org,2002:merge"
_Repeated: TypeAlias = dict[int, list[tuple[str, list[int]]]]  # id of a mapping node -> (key, its lines)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read an override file.

    Raises RecipeError where the file cannot be read, is not UTF-8 or YAML, or does not say what a recipe must say;
    the message names the file as given, the line, what was found and what was wanted.
    """
    name = os.fspath(path)
    try:
        data = read_bytes(name, kind="recipe", error=RecipeError)
    except RecipeError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        if missing or os.path.isdir(name):
            what = "no such file" if missing else "is a directory"
            raise RecipeError(f"{name}: {what}; wanted an override file (YAML)") from None
        raise
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    return replace(_parse(text, name, Path(path)), text_sha256=hashlib.sha256(data).hexdigest())


def parse_recipe(text: str, name: str = "<string>") -> Recipe:
    """Read a recipe from text; messages call it `name`. Raises RecipeError as load_recipe does."""
    return _parse(text, name, None)


# From this many characters on the parser is libyaml where PyYAML has it: the same nodes, lines and values, ten times as
# fast (100,000 lines in 3 s). Shorter texts keep the parser in Python for its messages, which say more.
LONG_TEXT = 2**18


class _Types:
    """safe_load, but a scalar that its own type refuses (0x, 2001-99-99) is a YAML error with a place."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except yaml.YAMLError:
            raise
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            tag = node.tag.rpartition(":")[2]
            what = quote(node.value, 60) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise yaml.constructor.ConstructorError(
                None, None, f"{what} cannot be read as {tag}; quote it if it is meant as text", node.start_mark
            ) from None


class _Loader(_Types, yaml.SafeLoader):
    """In Python."""


class _FastLoader(_Types, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C. Texts are encodable and free of characters that YAML does not have."""


def yaml_loader(text: str) -> Any:
    """A safe loader of a text, limited by its size alone. Raises ReaderError for characters that YAML does not have."""
    if len(text) < LONG_TEXT:
        return _Loader(text)
    yaml.reader.Reader(text)  # libyaml would tell another position
    return _FastLoader(text)


def _read_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None, _Repeated]:
    """The value exactly as safe_load gives it, its node, and the keys written twice."""
    loader: Any = None
    try:
        loader = yaml_loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None, {}
        repeated = _repeated_keys(node)  # before construction, which mixes merged keys into the nodes
        return loader.construct_document(node), node, repeated
    except yaml.MarkedYAMLError as error:
        if "maximum nesting depth" in str(error.problem):
            raise _too_deep(name) from None
        raise _syntax_error(error, text, name) from None
    except yaml.reader.ReaderError as error:
        line = len(re.findall(r"\r\n|[\r\n]", text[: error.position])) + 1
        raise RecipeError(
            f"{name}:{line}: not YAML: the character U+{int(error.character):04X} is not allowed"
        ) from None
    except RecursionError:
        raise _too_deep(name) from None
    finally:
        if loader is not None:
            loader.dispose()


def _too_deep(name: str) -> RecipeError:
    return RecipeError(f"{name}: not a recipe: the YAML is nested too deeply")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = " ".join((error.problem or error.context or "cannot be read").split())
    if problem == "but found another document":
        return RecipeError(f'{at}: a second YAML document starts here ("---"); a recipe is one document')
    hint = ""
    if "alias" in f"{error.context} {problem}":
        hint = '; a pattern that starts with "*" needs quotes'
    elif mark and "\t" in text[mark.index : mark.index + 1]:
        hint = "; indent with blanks, not tabs"
    return RecipeError(f"{at}: not YAML: {problem}{hint}")


def _repeated_keys(root: yaml.Node) -> _Repeated:
    """Keys written more than once in one mapping, with their lines, by the id of the mapping's node."""
    repeated: _Repeated = {}
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], list[int]] = {}
            for key, value in node.value:
                children += (key, value)
                if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                    lines.setdefault((key.tag, key.value), []).append(line_of(key))
            repeated[id(node)] = [(text, at) for (_, text), at in lines.items() if len(at) > 1]
        for child in children:
            if id(child) not in seen:  # an alias is the same node again
                seen.add(id(child))
                waiting.append(child)
    return repeated


@dataclass(frozen=True)
class _Mapping:
    """A mapping that was read, with its nodes for the lines."""

    at: Place
    value: dict[Any, Any]
    node: yaml.MappingNode
    repeated: _Repeated
    known: tuple[str, ...]

    def place(self, key: str) -> Place:
        return self.at.inside(key, self._pair(key)[1])

    def _pair(self, key: str) -> tuple[yaml.Node, yaml.Node]:
        """The nodes of a text key and its value: the last that was written, as in the value itself."""
        return next(pair for pair in reversed(self.node.value) if pair[0].tag == TEXT_TAG and pair[0].value == key)

    def entries(self, key: str, known: tuple[str, ...]) -> Iterator[_Mapping]:
        """The mappings of a list. Raises RecipeError where it is no list or holds anything else."""
        at, items, node = self.place(key), self.value[key], self._pair(key)[1]
        if not isinstance(items, list) or not isinstance(node, yaml.SequenceNode):
            way_out = f'; write "{key}: []" for none' if items is None else ""
            raise at.error(f"{show_typed(items)} is not a list{way_out}")
        for number, (item, item_node) in enumerate(zip(items, node.value, strict=True)):
            item_at = self.at.inside(f"{key}[{number}]", item_node)
            if not isinstance(item, dict) or not isinstance(item_node, yaml.MappingNode):
                wanted = ", ".join(f"{word}: ..." for word in known[:2])
                raise item_at.error(f"{show_typed(item)} is not a mapping; wanted {{{wanted}}}")
            yield _Mapping(item_at, item, item_node, self.repeated, known)

    def require(self, key: str) -> Any:
        """Raises RecipeError where the key is missing, naming one that may have been meant for it."""
        if key in self.value:
            return self.value[key]
        slips = [other for other in self.value if other not in self.known and nearest_key(other, self.known) == key]
        hint = f"; {show(slips[0])} is not known: did you mean {quote(key)}?" if slips else ""
        raise self.at.error(f"{quote(key)} is missing{hint}")

    def text(self, key: str) -> str:
        """Raises RecipeError where the value is missing or not text."""
        value = self.require(key)
        if isinstance(value, str):
            return value
        node = self._pair(key)[1]
        way_out = f"; put it in quotes: {quote(node.value)}" if isinstance(node, yaml.ScalarNode) and node.value else ""
        raise self.place(key).error(f"{show_typed(value)} is not text{way_out}")

    def scalar(self, key: str) -> SourceId:
        """Raises RecipeError where the value is missing or a list, a mapping or a set."""
        value: SourceId = self.require(key)
        if not is_scalar(value):
            raise self.place(key).error(f"{show(value)} cannot be a source id; wanted text or a number")
        return value

    def note(self) -> str | None:
        """Ours and optional. Scalars that are not text are kept as they are spelled, anything else is dropped."""
        if self.value.get("note") is None:
            return None
        node = self._pair("note")[1]
        return node.value if isinstance(node, yaml.ScalarNode) else None

    def oddities(self) -> Iterator[str]:
        """What is no error, but may be a slip."""
        for text, lines in self.repeated.get(id(self.node), ()):
            last = Place(self.at.name, lines[-1], self.at.inside_file)
            earlier = ", ".join(map(str, lines[:-1]))
            yield f"{last}: {quote(text)} is written again (before: line {earlier}); the last one counts"
        for key in self.value:
            if key not in self.known:
                at = (
                    Place(self.at.name, line_of(self._pair(key)[0]), self.at.inside_file)
                    if isinstance(key, str)
                    else self.at
                )
                near = nearest_key(key, self.known)
                yield f"{at}: unknown key {show(key)} is ignored" + (f"; did you mean {quote(near)}?" if near else "")


def _parse(text: str, name: str, path: Path | None) -> Recipe:
    if "\t" in text and text.lstrip()[:1] == "{":  # JSON, whose strings hold no tab
        text = text.replace("\t", " ")
    data, node, repeated = _read_yaml(text, name)
    if data is None:
        raise RecipeError(f'{name}: is empty; wanted a mapping with "sources:" and "overrides:"')
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        line = line_of(node) if node is not None else 0
        raise Place(name, line).error(f'{show_typed(data)} is not a mapping; wanted "sources:" and "overrides:"')
    top = _Mapping(Place(name, line_of(node)), data, node, repeated, _TOP_KEYS)
    other = None if {"overrides", "sources"} & data.keys() else read_other(data, node, Place(name, line_of(node)))
    if other is not None:
        return Recipe(
            sources=tuple(other.sources.values()),
            overrides=tuple(other.overrides),
            base=other.base,
            path=path,
            name=name,
            warnings=tuple(other.warnings),
        )
    warnings = list(top.oddities())

    top.require("overrides")
    override_entries = list(top.entries("overrides", _OVERRIDE_KEYS))
    if override_entries:  # a plain copy may leave the sources out
        top.require("sources")
    sources: list[Source] = []
    seen: dict[SourceId, Source] = {}
    for entry in top.entries("sources", _SOURCE_KEYS) if "sources" in data else ():
        source = _read_source(entry)
        if not source.model_dir.strip():
            raise entry.place("model_dir").error("is blank; wanted a directory")
        if source.id in seen:
            before = seen[source.id]
            warnings.append(
                f"{entry.place('id')}: {show_typed(source.id)} is the id of line {before.line} again "
                f"({show_typed(before.id)}); the last directory counts: {quote(source.model_dir)}"
            )
        warnings += entry.oddities()
        seen[source.id] = source
        sources.append(source)

    overrides: list[Override] = []
    for entry in override_entries:
        override = Override(entry.text("key"), entry.scalar("source"), entry.at.line, entry.note())
        check_pattern(entry.place("key"), override.key)
        if override.source not in seen:
            raise unknown_source(entry.place("source"), override.source, sources)
        warnings += entry.oddities()
        overrides.append(override)

    return Recipe(
        sources=tuple(sources),
        overrides=tuple(overrides),
        base=data.get("base"),
        budget=data.get("budget"),
        provenance=data.get("provenance"),
        path=path,
        name=name,
        other={key: value for key, value in data.items() if key not in _TOP_KEYS},
        warnings=tuple(warnings),
    )


def _read_source(entry: _Mapping) -> Source:
    """A directory, or a source to be made. Raises RecipeError where an entry is both or neither."""
    kinds = [key for key in MADE_KINDS if key in entry.value]
    settings = {key: entry.value[key] for key in MADE_SETTINGS if key in entry.value}
    is_mode = "scheme" in kinds and settings == {
        "format": mlx_config.QUANT_METHOD
    }  # one of MLX's, whose names others have as well
    if settings and "bits" not in kinds and not is_mode:
        raise entry.at.error(f'"{next(iter(settings))}" goes with "bits" (a source that model_quantize makes)')
    if not kinds:
        return Source(entry.scalar("id"), entry.text("model_dir"), entry.at.line, entry.note())
    if "model_dir" in entry.value or len(kinds) > 1:
        both = ["model_dir", *kinds] if "model_dir" in entry.value else kinds
        raise entry.at.error(f"{' and '.join(map(quote, both))} exclude each other; a source is there or is made")
    spec = {kinds[0]: entry.scalar(kinds[0]), **{key: entry.scalar(key) for key in settings}}
    for key, value in spec.items():
        _check_setting(entry.place(key), key, value)
    return Source(entry.scalar("id"), describe_spec(spec), entry.at.line, entry.note(), spec)


def _check_setting(at: Place, key: str, value: Any) -> None:
    """Raise RecipeError for a value of a made source that is of another type than its key has."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e6 < value < 1e6  # NaN is not
    wanted = {
        "bits": (number, "a number"),
        "group_size": (
            (number and isinstance(value, int) and value > 0) or value == "channel",
            "a whole number, or channel",
        ),
        "symmetric": (isinstance(value, bool), "true or false"),
    }
    fits, what = wanted.get(key, (isinstance(value, str), "a name"))
    if not fits:
        raise at.error(f"{show_typed(value)[:200]} cannot be {key}; wanted {what}")


def resolve_dir(recipe: Recipe, model_dir: str) -> tuple[Path, str | None]:
    """Where a `model_dir` lies: in the working directory, or else beside the recipe file, with a note that says so.

    Raises RecipeError where neither exists, naming both places and the line.
    """
    if os.path.exists(model_dir):
        return Path(model_dir), None
    lines = [number for number, source in enumerate(recipe.sources) if source.model_dir == model_dir]
    at = Place(recipe.name)
    if lines:
        at = Place(recipe.name, recipe.sources[lines[-1]].line, f"sources[{lines[-1]}].model_dir")
    looked_in = [os.path.abspath(model_dir)]
    if recipe.path is not None and not os.path.isabs(model_dir):
        beside = recipe.path.parent / model_dir
        if os.path.exists(beside):
            return (
                beside,
                f"{at}: {quote(model_dir)} is not in the working directory; taken beside the recipe: {beside}",
            )
        if os.path.abspath(beside) not in looked_in:
            looked_in.append(os.path.abspath(beside))
    hint = '; "~" is not expanded here' if model_dir.startswith("~") else ""
    raise at.error(
        f"{quote(model_dir)} does not exist; looked for {' and '.join(str(place)[:300] for place in looked_in)}{hint}"
    )
