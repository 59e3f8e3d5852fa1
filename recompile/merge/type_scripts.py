"""Rules `regex=type` in commands and shell scripts of llama-quantize, of llama.cpp or ik_llama.cpp. Nothing is run.

A script may call the tool once (its arguments count, with the arrays and variables that they name), or hold the flags
alone: an array of them, or lines. Without flags, one variable with rules in it is a list for --custom-q.

As both tools have it, --token-embedding-type and --output-tensor-type decide before any rule. In a model without an
output head of its own the embedding is the head, and --output-tensor-type decides it after all rules. ik_llama.cpp's
--attn-q-type and its like decide what no rule of --custom-q does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from recompile.errors import RecipeError
from recompile.io.files import read_text
from recompile.recipe.messages import Place, quote
from recompile.recipe.shell_words import Piece, Script, Word, read_script

LLAMA_QUANTIZE, IK = "llama-quantize", "ik-custom-q"
EMBEDDING, OUTPUT = "--token-embedding-type", "--output-tensor-type"
RULES, RULES_FILE, CUSTOM = "--tensor-type", "--tensor-type-file", "--custom-q"
# ik_llama.cpp's, each found in the names that hold the text
_KINDS = {
    "--attn-q-type": r"attn_q\.weight",
    "--attn-k-type": r"attn_k\.weight",
    "--attn-v-type": r"attn_v\.weight",
    "--attn-qkv-type": r"attn_qkv\.weight",
    "--attn-output-type": r"attn_output\.weight",
    "--ffn-gate-type": "ffn_gate",
    "--ffn-down-type": "ffn_down",
    "--ffn-up-type": "ffn_up",
}
TAKEN = (RULES, RULES_FILE, CUSTOM, EMBEDDING, OUTPUT, *_KINDS)
_VALUED = frozenset({"--imatrix", "--include-weights", "--exclude-weights", "--override-kv"})  # change no type
_BARE = frozenset(
    {"--allow-requantize", "--keep-split", "--dry-run", "--hide-imatrix", "--ignore-imatrix-rules", "--no-importance"}
)
_REFUSED = {
    "--pure": "gives every tensor one type, whatever the rules say",
    "--prune-layers": "takes layers out of the model",
    "--target-bpw": "lets the tool choose the types",
    "--leave-output-tensor": "leaves the output head as the input file has it",
    "--repack": "stores rows interleaved",
}
_TOOLS = re.compile(r"(llama-)?quantize(\.exe)?")
_TYPE = re.compile(r"(?:I?Q|TQ)\d\w*|BF16|F16|F32|(?:MX|NV)FP4\w*|COPY", re.IGNORECASE)
_FLAG_LINE = re.compile(rf"^(?!\s*#).*?(?:^|[\s(\"'])(?:{'|'.join(map(re.escape, TAKEN))})(?=[\s=]|$)", re.MULTILINE)
_CALL = re.compile(r"^(?!\s*#).*?(?:^|[\s/\"'])llama-quantize(?:\.exe)?[\"']?(?=\s)", re.MULTILINE)
_QUOTED = re.compile(r"^\s*(?:export\s+)?[A-Za-z_]\w*\+?=(?:[\"'][ \t]*$|[\"'(])", re.MULTILINE)
_YAML = re.compile(r"^(?:sources|overrides)\s*:", re.MULTILINE)


@dataclass(frozen=True)
class Said:
    """One `regex=type` and where it stands."""

    text: str
    line: int
    file: str = ""  # where it is not the script itself
    optional: bool = False  # of a flag: no error where the model has no such tensor


@dataclass(frozen=True)
class ScriptRules:
    """What a script says of types."""

    dialect: str
    rules: tuple[Said, ...]
    tied: Said | None = None  # of the embedding, after all rules, where there is no output head
    base: str | None = None  # type or preset of what no rule names
    base_line: int = 0
    notes: tuple[str, ...] = ()


def is_script(text: str) -> bool:
    """Whether a text is commands, flags or assignments, and no plain list of rules."""
    if _YAML.search(text) or text.lstrip()[:1] in ("{", "["):
        return False
    return any(pattern.search(text) for pattern in (_FLAG_LINE, _CALL, _QUOTED))


def read_script_rules(text: str, name: str, folder: Path | None = None) -> ScriptRules:
    """The rules of a script. folder: where files that it names may lie, beside the working directory.

    Raises RecipeError, naming the line, for what cannot be read or not be said by rules, for two commands that differ,
    and for a text that only running the script would give.
    """
    script = read_script(text, name)
    calls = [arguments for command in script.commands if (arguments := _arguments(command)) is not None]
    reader = _Arguments(name, folder)
    if not calls:
        return reader.read(_loose(script, name))
    found = [reader.read(words) for words in calls]
    found = [one for one in found if one.rules or len(found) == 1]
    if not found:
        raise Place(name, calls[0][0].line if calls[0] else 0).error(f"{LLAMA_QUANTIZE}: no command gives a rule")
    first, *more = found
    for other, words in zip(more, calls[1:], strict=False):
        if [said.text for said in other.rules] != [said.text for said in first.rules]:
            raise Place(name, words[0].line).error(
                f"{first.dialect}: a second command, with other rules than the first; leave one in the file"
            )
    if any(other.base != first.base for other in more):
        note = f"{name}: {LLAMA_QUANTIZE}: {len(found)} commands of several types; {{bits}} says that of other tensors"
        return replace(first, base=None, notes=(*first.notes, note))
    return first


def _arguments(command: Sequence[Word]) -> list[Word] | None:
    """The arguments of a command that calls the tool; None for any other."""
    for at, word in enumerate(command):
        if _TOOLS.fullmatch(PurePosixPath(word.text.replace("\\", "/")).name):
            return list(command[at + 1 :])
    return None


def _loose(script: Script, name: str) -> list[Word]:
    """The flags of a text that calls no tool."""

    def has_flags(words: Sequence[Word]) -> bool:
        return any(word.text.partition("=")[0] in TAKEN for word in words)

    arrays = {key: words for key, words in script.arrays.items() if has_flags(words)}
    lines = [word for command in script.commands if has_flags(command) for word in command]
    texts = {key: word for key, word in script.texts.items() if not word.unknown and _holds_rules(word)}
    said = [*arrays, *(["the flags"] if lines else [])] or list(texts)
    if not said:
        raise RecipeError(f"{name}: no rule in it; wanted a command of llama-quantize, or lines or words REGEX=TYPE")
    if len(said) > 1:
        raise RecipeError(
            f"{name}: shell script: rules in {', '.join(said[:5])}, and no command; leave one in the file"
        )
    if lines:
        return lines
    if arrays:
        return next(iter(arrays.values()))
    (word,) = texts.values()
    return [replace(word, pieces=tuple(replace(p, text=CUSTOM, line=word.line) for p in word.pieces[:1])), word]


def _holds_rules(word: Word) -> bool:
    first = next((part for _, part in _listed(word)), "")
    return bool(re.fullmatch(rf"[^=\s]+={_TYPE.pattern}", first, re.IGNORECASE))


def _listed(word: Word) -> Iterator[tuple[int, str]]:
    """The rules of a list with commas or line breaks between, without its comment lines."""
    for line, said in word.lines():
        if not said.lstrip().startswith("#"):
            yield from ((line, part.strip()) for part in said.split(",") if part.strip())


class _Arguments:
    """Reads the arguments of one call."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self.folder = name, folder

    def read(self, words: Sequence[Word]) -> ScriptRules:
        rules, custom, kinds = list[Said](), list[Said](), list[Said]()
        named: dict[str, Said] = {}
        plain, odd = list[Word](), False
        waiting = iter(words)
        for word in waiting:
            flag, equals, _ = word.text.partition("=")
            if flag in _REFUSED:
                raise self._error(word, f"{flag} {_REFUSED[flag]}, which a recipe cannot say; leave it out")
            if flag in TAKEN:
                value = replace(word, pieces=_after(word, len(flag) + 1)) if equals else next(waiting, None)
                self._check(flag, value, word)
                assert value is not None, "checked"
                if flag == CUSTOM:
                    custom += [Said(text, line) for line, text in _listed(value)]
                elif flag == RULES:
                    rules.append(Said(value.text.strip(), value.first_line))
                elif flag == RULES_FILE:
                    rules += self._of_file(value)
                elif flag in _KINDS:
                    kinds.append(Said(f"{_KINDS[flag]}={value.text}", value.first_line, optional=True))
                else:
                    tensor = r"token_embd\.weight" if flag == EMBEDDING else r"output\.weight"
                    named[flag] = Said(f"^{tensor}$={value.text}", value.first_line, optional=True)
            elif flag in _VALUED:
                next(waiting, None)
            elif flag.startswith("--") and flag not in _BARE:
                odd = True
            elif re.search(r"\[[@*]\]|\$[@*]", word.unknown):
                raise self._error(word, f"{word.unknown} is not set in the file, and may hold rules")
            elif word.pieces and not flag.startswith("--") and (word.text or word.unknown):
                plain.append(word)
        if rules and (custom or kinds):
            raise self._error(words[0], f"{RULES} is llama.cpp's and {CUSTOM} is ik_llama.cpp's; no tool has both")
        tied = named.get(OUTPUT)
        base, line, note = self._base(plain, odd)
        return ScriptRules(
            IK if custom or kinds else LLAMA_QUANTIZE,
            (*named.values(), *rules, *custom, *kinds),
            None if tied is None else replace(tied, text=f"^token_embd\\.weight$={tied.text.rpartition('=')[2]}"),
            base,
            line,
            note,
        )

    def _error(self, word: Word, problem: str) -> RecipeError:
        return Place(self.name, word.line).error(f"{LLAMA_QUANTIZE}: {problem}")

    def _check(self, flag: str, value: Word | None, at: Word) -> None:
        if value is None or not value.pieces or value.text.startswith("--"):
            raise self._error(at, f"{flag} has no value")
        if value.unknown:
            raise self._error(
                value,
                f"{flag} {quote(value.shown)}: {value.unknown} is known only when the script runs; write its text",
            )

    def _of_file(self, value: Word) -> Iterator[Said]:
        path = Path(value.text)
        if not path.exists() and self.folder is not None and not path.is_absolute():
            path = self.folder / path
        if not path.exists():
            raise self._error(value, f"{RULES_FILE} {quote(value.text)} does not exist")
        said = read_text(path, kind="recipe", error=RecipeError)
        for number, line in enumerate(said.splitlines(), 1):
            if not line.lstrip().startswith("#"):
                yield from (Said(word, number, str(path)) for word in line.split())

    def _base(self, plain: Sequence[Word], odd: bool) -> tuple[str | None, int, tuple[str, ...]]:
        """(type, line, notes) of INPUT [OUTPUT] TYPE [THREADS]."""
        if len(plain) < 2:
            return None, 0, ()
        short = _TYPE.fullmatch(plain[1].text) is not None and not plain[1].unknown
        word = plain[1] if short else plain[2] if len(plain) > 2 else plain[1]
        if odd and not _TYPE.fullmatch(word.text):
            word = next((one for one in plain[1:] if _TYPE.fullmatch(one.text)), word)
        if word.unknown or not _TYPE.fullmatch(word.text):
            said = (
                f"{self.name}:{word.line}: {LLAMA_QUANTIZE}: the type of other tensors, {quote(word.shown)}, is not "
                f"known; {{bits}} says it"
            )
            return None, 0, (said,)
        return (None if word.text.upper() == "COPY" else word.text), word.line, ()


def _after(word: Word, count: int) -> tuple[Piece, ...]:
    """The pieces of a word without its first characters."""
    rest = []
    for piece in word.pieces:
        cut = min(count, len(piece.text))
        count -= cut
        if piece.text[cut:] or piece.unknown:
            rest.append(replace(piece, text=piece.text[cut:]))
    return tuple(rest)
