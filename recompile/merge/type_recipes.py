"""Recipes of other tools, which name a GGUF type for every tensor: read, resolved, written. Imports no torch.

All three are lists of `regex=type`. The regex is searched in the GGUF tensor name (not matched as a whole), and the
first rule that is found decides.

    llama-quantize  --tensor-type REGEX=TYPE, repeated, or a file of such words for --tensor-type-file; the tool
                    lower-cases the regex
    ik-custom-q     ik_llama.cpp's --custom-q: one list, commas between; people keep it as lines with # comments
    thireus         GGUF-Tool-Suite's recipe files: anchored lines and many # comments

Whole commands and shell scripts of the first two are read as well, see type_scripts.py.

Our own recipes name sources. `as_recipe` turns types into sources: GGUF files of one model that hold the types asked
for, from `open_type_sources`; `types_of` goes the other way, from a resolved mix to the type of each tensor.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from recompile.checkpoint.checkpoint import GgufCheckpoint
from recompile.errors import FormatError, RecipeError
from recompile.formats.gguf_types import TYPES, find_type
from recompile.gguf.container import GgufFile, open_gguf
from recompile.io.files import open_regular, read_text
from recompile.io.patterns import Regex, compile_regex
from recompile.merge.overlay import Overlay
from recompile.merge.type_scripts import Said, is_script, read_script_rules
from recompile.recipe.recipe import Override, Recipe, Source

SHOWN_RULES = 10
DIALECTS = ("llama-quantize", "ik-custom-q", "thireus")
# What Python's `re` takes and the tools' std::regex refuses or reads in another way.
_NOT_ECMASCRIPT = re.compile(r"\(\?(?![:=!])|\\[AZ]|[*+?}]\+")
_LATER_SPLIT = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class TypeRule:
    """One `regex=type`."""

    pattern: str
    type: str  # a key of TYPES, "Q4_K"
    line: int = 0  # from 1; 0 where no file was read
    file: str = ""  # where the line is, if not in the recipe's own file
    optional: bool = False  # of a flag for one tensor: no error where a model has none

    @cached_property
    def regex(self) -> Regex:
        return compile_regex(self.pattern, f"line {self.line}", error=RecipeError)


@dataclass(frozen=True)
class TypeRecipe:
    """A list of rules; the first whose regex is found in a name decides."""

    rules: tuple[TypeRule, ...]
    dialect: str
    name: str = "<string>"
    base: str | None = None  # the type or preset of what no rule names, where a command says it
    base_line: int = 0
    tied: TypeRule | None = None  # decides the embedding after all rules, in a model whose embedding is the head
    notes: tuple[str, ...] = ()  # what was not taken

    def of(self, tensors: Iterable[str]) -> TypeRecipe:
        """The same for a model with these tensors: with the rule for a tied head, where it is."""
        if self.tied is None or "output.weight" in tensors:
            return replace(self, tied=None)
        return replace(self, rules=(*self.rules, self.tied), tied=None)

    def place(self, rule: TypeRule) -> str:
        """`mix.txt:9`, for messages."""
        return f"{rule.file or self.name}:{rule.line}"

    def rule_of(self, tensor: str) -> TypeRule | None:
        """The rule that decides a GGUF tensor name; None where none is found in it."""
        return next((rule for rule in self.rules if rule.regex.search(tensor)), None)

    def resolve(self, tensors: Iterable[str]) -> dict[str, str]:
        """GGUF tensor name -> type, of the tensors that a rule decides."""
        found = ((name, self.rule_of(name)) for name in tensors)
        return {name: rule.type for name, rule in found if rule is not None}

    def unmatched(self, tensors: Iterable[str]) -> list[TypeRule]:
        """Rules whose regex is found in no name at all, though the model should have one."""
        names = list(tensors)
        needed = [rule for rule in self.rules if not rule.optional]
        return [rule for rule in needed if not any(rule.regex.search(name) for name in names)]

    def stray(self, tensors: Iterable[str]) -> str | None:
        """A sentence on the rules that are found in no tensor name; None where there are none."""
        stray = self.unmatched(tensors)
        said = "; ".join(
            f'{self.place(rule)}: "{rule.pattern[:200]}" is found in no tensor name' for rule in stray[:SHOWN_RULES]
        )
        if len(stray) > SHOWN_RULES:
            said += f"; and {len(stray) - SHOWN_RULES} more rules"
        return said or None

    def never_deciding(self, tensors: Iterable[str]) -> list[str]:
        """A sentence for each rule that is found in names and decides none."""
        shadowed = self.shadowed(tensors)
        said = [
            f'{self.place(hidden)}: "{hidden.pattern[:200]}" never decides: it is found only in names that '
            f'"{winner.pattern[:200]}" on line {winner.line} decides before it (the first rule found in a name wins)'
            for hidden, winner in shadowed[:SHOWN_RULES]
        ]
        if len(shadowed) > SHOWN_RULES:
            said.append(f"{self.name}: and {len(shadowed) - SHOWN_RULES} more rules that never decide")
        return said

    def shadowed(self, tensors: Iterable[str]) -> list[tuple[TypeRule, TypeRule]]:
        """Rules that are found in some names and decide none, each with the rule that decides the first of them."""
        names = list(tensors)
        decided = {name: self.rule_of(name) for name in names}
        deciding = {id(rule) for rule in decided.values()}
        hidden = []
        for rule in self.rules:
            first = (
                next((name for name in names if rule.regex.search(name)), None) if id(rule) not in deciding else None
            )
            winner = decided[first] if first is not None else None
            if winner is not None:
                hidden.append((rule, winner))
        return hidden


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_type_recipe(path: str | os.PathLike[str], dialect: str | None = None) -> TypeRecipe:
    """Read a file; see `parse_type_recipe`. Raises RecipeError."""
    text = read_text(os.fspath(path), kind="recipe", error=RecipeError)
    return parse_type_recipe(text, os.fspath(path), dialect, Path(path).parent)


def parse_type_recipe(
    text: str, name: str = "<string>", dialect: str | None = None, folder: Path | None = None
) -> TypeRecipe:
    """Rules of a text in one of DIALECTS; None: recognized by its content. folder: as in `read_script_rules`

    `# ...` up to the end of a line is a comment where it begins a line. Types are read in any case.
    Raises RecipeError with the line for what is no rule, a regex that the tool would refuse, an unknown type, and a
    text without rules.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise RecipeError(f'{name}: "{dialect}" is no recipe format; known: {", ".join(DIALECTS)}')
    if is_script(text):
        return _of_script(text, name, dialect, folder)
    dialect = dialect or _guess(text)
    rules = [_rule(Said(word, number), name, dialect) for number, word in _words(text, dialect)]
    if not rules:
        raise RecipeError(f"{name}: no rule in it; wanted lines or words REGEX=TYPE")
    return TypeRecipe(tuple(rules), dialect, name)


def _of_script(text: str, name: str, dialect: str | None, folder: Path | None) -> TypeRecipe:
    said = read_script_rules(text, name, folder)
    if dialect not in (None, said.dialect):
        raise RecipeError(f"{name}: is a script of {said.dialect}, not of {dialect}")
    rules = tuple(_rule(one, name, said.dialect) for one in said.rules)
    if not rules:
        raise RecipeError(f"{name}: {said.dialect}: no rule in it; wanted a --tensor-type, --custom-q or the like")
    tied = None if said.tied is None else _rule(said.tied, name, said.dialect)
    return TypeRecipe(rules, said.dialect, name, said.base, said.base_line, tied, said.notes)


def _rule(said: Said, name: str, dialect: str) -> TypeRule:
    where = f"{said.file or name}:{said.line}"
    pattern, equals, type_name = said.text.rpartition("=")
    if not equals or not pattern.strip() or not type_name.strip():
        raise RecipeError(
            f'{where}: "{said.text[:200]}" is no rule; wanted REGEX=TYPE, such as blk\\.0\\.ffn_down=q6_K'
        )
    pattern = pattern.strip()
    if dialect == "llama-quantize":
        pattern = pattern.lower()  # as the tool does
    _check_regex(pattern, where)
    return TypeRule(pattern, _type(type_name.strip(), where), said.line, said.file, said.optional)


def looks_like_type_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether the first lines of a file that say something are rules `regex=type` with a known type."""
    try:
        with open_regular(os.fspath(path), kind="recipe", error=RecipeError) as file:
            text = file.read(1 << 16).decode("utf-8", "replace")
    except (RecipeError, OSError):
        return False
    if is_script(text):
        return True
    lines = [line.strip() for line in text.splitlines()]
    said = next((line for line in lines if line and not line.startswith("#")), "")
    said = said.strip(" \"'")
    first = re.split(r"[,\s]", said, maxsplit=1)[0]
    pattern, equals, type_name = first.rpartition("=")
    return bool(equals and pattern) and type_name.strip("\"'").upper() in TYPES


def _guess(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rules = [line for line in lines if not line.startswith("#")]
    if any("," in rule for rule in rules) or len(rules) < len(lines):
        anchored = rules and all(rule.startswith("^") for rule in rules) and not any("," in rule for rule in rules)
        return "thireus" if anchored else "ik-custom-q"
    return "llama-quantize"


def _words(text: str, dialect: str) -> Iterator[tuple[int, str]]:
    """(line, rule) in order. Both fork formats are joined with commas before the engine sees them."""
    between = r"\s+" if dialect == "llama-quantize" else r","
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        for word in re.split(between, line.strip().rstrip("\\").strip()):
            word = word.strip().strip("\"'").strip()
            if word:
                yield number, word


def _type(text: str, where: str) -> str:
    try:
        return find_type(text).name
    except FormatError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_regex(pattern: str, where: str) -> None:
    compile_regex(pattern, where, error=RecipeError)
    found = _NOT_ECMASCRIPT.search(pattern)
    if found:
        raise RecipeError(f'{where}: "{pattern}": the tools\' regular expressions (ECMAScript) have no "{found[0]}"')


# ---- writing ---------------------------------------------------------------------------------------------------------


def spelled(type_name: str) -> str:
    """A type as ggml spells it: q4_K, iq4_xs, bf16; the fork's own all in lower case."""
    lower = type_name.lower()
    return lower[:-1] + "K" if re.fullmatch(r"q\d_k", lower) else lower


def emit(types: Mapping[str, str], dialect: str, comment: str = "") -> str:
    """GGUF tensor name -> type, as a recipe of a dialect that resolves to the same, name by name.

    Tensors of one kind and type share a rule over their layers; every rule is anchored, so the order says nothing.
    llama-quantize gets a file for --tensor-type-file, without comments, since the tool reads those as rules; 1-D
    tensors do no harm in it (the tool never quantizes them). Raises RecipeError for a name that cannot be written.
    """
    if dialect not in DIALECTS:
        raise RecipeError(f'"{dialect}" is no recipe format; known: {", ".join(DIALECTS)}')
    rules = [f"{pattern}={spelled(type_name)}" for pattern, type_name in _patterns(types, dialect)]
    if dialect == "ik-custom-q":
        return ",".join(rules) + "\n"
    if dialect == "llama-quantize":
        return "\n".join(rules) + "\n"
    counts = Counter(types.values())
    head = [f"# {line}" for line in comment.splitlines()]
    tail = ["", "## Tensors of each type", *(f"# {spelled(name)}: {count}" for name, count in counts.most_common())]
    return "\n".join([*head, *rules, *tail]) + "\n"


def _patterns(types: Mapping[str, str], dialect: str) -> Iterator[tuple[str, str]]:
    layers: dict[tuple[str, str], list[int]] = {}
    for tensor, type_name in types.items():
        if dialect == "llama-quantize" and tensor != tensor.lower():
            raise RecipeError(f"{tensor}: llama-quantize lower-cases its rules, so none can name this tensor")
        if "," in tensor or "=" in tensor or any(character.isspace() for character in tensor):
            raise RecipeError(
                f"{tensor}: a tensor name with a comma, an equals sign or a blank cannot be in such a rule"
            )
        found = _LAYER.match(tensor)
        if found and str(int(found[1])) == found[1]:
            layers.setdefault((found[2], type_name), []).append(int(found[1]))
        else:
            yield f"^{re.escape(tensor)}$", type_name
    for (rest, type_name), numbers in layers.items():
        yield rf"^blk\.{numbers_regex(numbers)}\.{re.escape(rest)}$", type_name


def numbers_regex(numbers: Sequence[int]) -> str:
    r"""A regex for exactly these whole numbers: [0, 1, 2, 10, 11] -> "([0-2]|1[0-1])"; one number is itself."""
    tens: dict[int, set[int]] = {}
    for number in set(numbers):
        tens.setdefault(number // 10, set()).add(number % 10)
    by_digits: dict[frozenset[int], list[int]] = {}
    for ten, digits in sorted(tens.items()):
        by_digits.setdefault(frozenset(digits), []).append(ten)
    parts = []
    for digits_of, group in by_digits.items():
        last = _digits(sorted(digits_of))
        if 0 in group:
            parts.append(last)
        higher = [ten for ten in group if ten]
        if len(higher) == 1 or any(ten > 9 for ten in higher):
            parts += [f"{ten}{last}" for ten in higher]
        elif higher:
            parts.append(f"{_digits(higher)}{last}")
    if len(parts) == 1 and parts[0].isdigit():
        return parts[0]
    return f"({'|'.join(parts)})"


def _digits(digits: Sequence[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    runs: list[list[int]] = []
    for digit in digits:
        if runs and digit == runs[-1][1] + 1:
            runs[-1][1] = digit
        else:
            runs.append([digit, digit])
    return "[" + "".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}{b}" for a, b in runs) + "]"


# ---- types and sources -----------------------------------------------------------------------------------------------


def types_of(overlay: Overlay) -> dict[str, str]:
    """GGUF tensor name -> stored type, of every tensor of a mix of GGUF files.

    Raises RecipeError where the base is no GGUF file, or experts of one tensor are of several types.
    """
    if not isinstance(overlay.base, GgufCheckpoint):
        raise RecipeError(f"{overlay.base.label}: tensors have GGUF types in GGUF files only; give one as {{base}}")
    types: dict[str, str] = {}
    for placement in overlay.placements.values():
        for part in placement.stored.parts.values():
            name = placement.checkpoint.aliases.get(part.name, part.name)
            if types.setdefault(name, part.dtype) != part.dtype:
                raise RecipeError(
                    f"{name}: its experts are of types {types[name]} and {part.dtype}; one tensor has one"
                )
    order = {name: n for n, name in enumerate(overlay.base.file.tensors)}
    return dict(sorted(types.items(), key=lambda item: order.get(item[0], len(order))))


@dataclass(frozen=True)
class TypeSource:
    """A GGUF file that stands for one type."""

    type: str
    path: Path
    file: GgufFile

    def holds(self, tensor: str) -> str | None:
        """The type that a tensor has there; None where there is no such tensor."""
        return self.file.tensors[tensor].type.name if tensor in self.file.tensors else None


def open_type_sources(entries: Iterable[str]) -> tuple[TypeSource, ...]:
    """`TYPE=PATH` entries, or directories of GGUF files, each file standing for the type most of its weights have.

    Raises RecipeError for an unknown type, a directory without GGUF files, two files for one type.
    """
    found: list[TypeSource] = []
    for entry in entries:
        type_name, equals, path = entry.partition("=")
        if equals and type_name.upper() in TYPES:
            found.append(TypeSource(find_type(type_name).name, Path(path), open_gguf(path)))
            continue
        directory = Path(entry).expanduser()
        if not directory.is_dir():
            raise RecipeError(
                f'{{type_sources}} "{entry}": wanted TYPE=FILE.gguf (Q4_K=model-Q4_K.gguf) or a directory of GGUF files'
            )
        files = [
            p for p in sorted(directory.rglob("*.gguf")) if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", p.name)
        ]
        if not files:
            raise RecipeError(f"{{type_sources}} {entry}: there is no GGUF file in this directory")
        for path_of in files:
            file = open_gguf(path_of)
            found.append(TypeSource(_main_type(file), path_of, file))
    for type_name, count in Counter(source.type for source in found).items():
        if count > 1:
            paths = " and ".join(str(source.path) for source in found if source.type == type_name)
            raise RecipeError(f"{{type_sources}}: {paths} both stand for {type_name}; name one: {type_name}=FILE.gguf")
    return tuple(found)


def _main_type(file: GgufFile) -> str:
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.ne) > 1:
            weights[tensor.type.name] += tensor.numel
    return weights.most_common(1)[0][0] if weights else "F32"


def as_recipe(
    types: TypeRecipe, base: GgufFile, sources: Sequence[TypeSource], *, allow_unmatched: bool = False
) -> Recipe:
    """A recipe over GGUF tensor names that takes every tensor from a file that has it in the type asked for.

    A tensor that no rule names, or that the base already has in the type, stays the base's. Where the file that stands
    for a type holds a tensor in another one (its block does not divide the row), that is taken, with a warning.
    Raises RecipeError for a type without a source, and for rules that match no tensor (unless allowed).
    """
    types = types.of(base.tensors)
    warnings = []
    if types.base is not None:
        warnings.append(
            f"{types.name}:{types.base_line}: {types.dialect}: {types.base} is not used: what no rule names stays as "
            f"the base file has it"
        )
    stray = types.stray(base.tensors)
    if stray is not None:
        if not allow_unmatched:
            raise RecipeError(f"{stray} ({{allow_unmatched}} goes on without)")
        warnings.append(stray)
    warnings += types.never_deciding(base.tensors)
    by_type = {source.type: source for source in sources}
    overrides: list[Override] = []
    used: dict[str, TypeSource] = {}
    missing: dict[str, TypeRule] = {}
    other: dict[tuple[str, str], list[str]] = {}
    for name, tensor in base.tensors.items():
        rule = types.rule_of(name)
        if rule is None or tensor.type.name == rule.type:
            continue
        exact = next((source for source in sources if source.holds(name) == rule.type), None)
        chosen = exact or by_type.get(rule.type)
        got = chosen.holds(name) if chosen else None
        if chosen is None or got is None:
            missing.setdefault(rule.type, rule)
            continue
        if got != rule.type:
            other.setdefault((rule.type, got), []).append(name)
        used[chosen.type] = chosen
        overrides.append(Override(name, chosen.type, rule.line))
    if missing:
        wanted = ", ".join(f"{name} ({types.place(rule)})" for name, rule in missing.items())
        there = ", ".join(sorted(by_type)) or "none"
        raise RecipeError(
            f"{types.name}: no source for {wanted}; sources given: {there}; add {{type_sources}} TYPE=FILE.gguf"
        )
    for (asked, got), names in other.items():
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.append(f"{types.name}: {few}: {asked} is asked for, {by_type[asked].path} has {got}, which is taken")
    return Recipe(
        tuple(Source(source.type, str(source.path)) for source in used.values()),
        tuple(overrides),
        name=types.name,
        warnings=tuple(warnings),
    )
