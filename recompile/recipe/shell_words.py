"""Shell text as the words of its commands, with lines. Nothing is run: what only running could tell is unknown.

Read: quotes, backslashes, comments, continued lines, `NAME=text`, `NAME=(words)`, `NAME+=...`, `$NAME`, `${NAME}`,
`"${NAME[@]}"` and here-documents (skipped). A command substitution gives an unknown text, but for the one way in which
lists of rules are joined: `NAME=$(echo "$NAME" | grep -v '^#' | sed ...)` drops comments and puts commas for line
breaks, so that NAME stays as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from recompile.errors import RecipeError
from recompile.recipe.messages import Place

LONGEST_LINE = 1 << 20  # characters, of a line and of what variables expand to
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
_BLANK = re.compile(r"[ \t]+")
_PLAIN = re.compile(r"[^ \t\n'\"\\$`;&|()<>]+")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(\[[@*]\])?\}|\{[^}\n]*\}|[0-9@*#?$!-])")
_REDIRECTED = re.compile(r"\d*(?:<<<|<&|<>|<|>>|>&|>\||>)|&>>?")
_BETWEEN = (")", "\n", " ", "\t", "#", "<", ">", "\\\n")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_HERE = re.compile(r"<<(-?)\s*(['\"]?)([A-Za-z_]\w*)\2")
# what joins a list of rules, as sed's s command: line breaks to commas, and none at either end
_JOINS = {(r"\n+", ","), (r"\n", ","), (",$", ""), ("^,", ""), (",+$", ""), ("^,+", ""), (",+", ","), (r"\s*#.*", "")}
_COMMENT_LINES = re.compile(r"\^(\[\[:space:\]\]\*|\\s\*|\[ \\t\]\*| \*)?(#|\$)")


@dataclass(frozen=True)
class Piece:
    """Text that begins on a line; its line breaks count on."""

    text: str
    line: int
    unknown: str = ""  # what stands for a text that only running would tell: "$1"


@dataclass(frozen=True)
class Word:
    """One word of a command after quotes are removed."""

    pieces: tuple[Piece, ...]
    line: int

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def first_line(self) -> int:
        """The line on which its text begins: of the variable that gave it."""
        return next((piece.line for piece in self.pieces if piece.text), self.line)

    @property
    def shown(self) -> str:
        """For messages: with the unknown parts as they are written."""
        return "".join(piece.unknown or piece.text for piece in self.pieces)

    @property
    def unknown(self) -> str:
        """The first part that only running would tell; empty where there is none."""
        return next((piece.unknown for piece in self.pieces if piece.unknown), "")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Its text line by line."""
        held: list[str] = []
        line = self.line
        for piece in self.pieces:
            for number, part in enumerate(piece.text.split("\n")):
                if number:
                    yield line, "".join(held)
                    held = []
                if not any(held):
                    line = piece.line + number
                held.append(part)
        yield line, "".join(held)


@dataclass
class Script:
    """What a text holds: its commands in order, and the variables as they stand at its end."""

    commands: list[list[Word]] = field(default_factory=list)
    texts: dict[str, Word] = field(default_factory=dict)
    arrays: dict[str, list[Word]] = field(default_factory=dict)


def read_script(text: str, name: str) -> Script:
    """Words of a shell script. Raises RecipeError, naming the line, for a quote or a bracket that is not closed,
    a control character, and a line of more than LONGEST_LINE characters."""
    text = text.replace("\r\n", "\n")
    found = _CONTROL.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise RecipeError(f"{name}:{line}: the control character U+{ord(found[0]):04X} is not allowed in a script")
    for number, said in enumerate(text.split("\n"), 1):
        if len(said) > LONGEST_LINE:
            raise RecipeError(f"{name}:{number}: has {len(said)} characters; a line has at most {LONGEST_LINE}")
    return _Reader(text, name).read()


Put: TypeAlias = Callable[..., None]  # (text, line, what is unknown)


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at, self.line = text, name, 0, 1
        self.script = Script()
        self.pending: list[tuple[bool, str]] = []  # here-documents that begin after this line

    def error(self, line: int, problem: str) -> RecipeError:
        return Place(self.name, line).error(f"shell script: {problem}")

    def read(self) -> Script:
        command: list[Word] = []
        while self.at < len(self.text):
            began = self.at
            if self._between():
                if command:
                    self.script.commands.append(command)
                command = []
                continue
            if self.at != began:
                continue
            assigned = _ASSIGNED.match(self.text, self.at)
            if assigned and not command:
                self._assign(assigned)
            else:
                command += self._word()
        if command:
            self.script.commands.append(command)
        return self.script

    def _between(self) -> bool:
        """Skip blanks and comments; whether a command ends here (and skip what ends it)."""
        text = self.text
        blank = _BLANK.match(text, self.at)
        if blank:
            self.at = blank.end()
            return False
        if text.startswith("\\\n", self.at):
            self.at, self.line = self.at + 2, self.line + 1
            return False
        char = text[self.at]
        if char == "#":
            end = text.find("\n", self.at)
            self.at = len(text) if end < 0 else end
            return False
        here = _HERE.match(text, self.at) if char == "<" and not text.startswith("<<<", self.at) else None
        if here:
            self.pending.append((bool(here[1]), here[3]))
            self.at = here.end()
            return False
        redirected = _REDIRECTED.match(text, self.at)
        if redirected:
            blank = _BLANK.match(text, redirected.end())
            self.at = blank.end() if blank else redirected.end()
            if self.at < len(text) and text[self.at] not in "\n;&|()<>":
                self._word()  # where it leads
            return False
        if char == "\n":
            self._newline()
            return True
        if char in ";&|()":
            self.at += 1
            return True
        return False

    def _newline(self) -> None:
        self.at, self.line = self.at + 1, self.line + 1
        for stripped, end in self.pending:
            began = self.line
            while True:
                if self.at >= len(self.text):
                    raise self.error(began, f"a here-document is not closed; wanted a line {end}")
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                said = self.text[self.at : stop]
                self.at, self.line = min(stop + 1, len(self.text)), self.line + 1
                if (said.lstrip("\t") if stripped else said) == end:
                    break
        self.pending = []

    def _assign(self, found: re.Match[str]) -> None:
        name, more = found[1], bool(found[2])
        self.at = found.end()
        if self.text.startswith("(", self.at):
            words = self._array()
            self.script.arrays[name] = [*(self.script.arrays.get(name, []) if more else []), *words]
            return
        line = self.line
        stops = self.at >= len(self.text) or self.text[self.at] in " \t\n;&|)"
        (word,) = [Word((), line)] if stops else self._word(splits=False, assigned=name)
        if more and name in self.script.texts:
            word = self._bounded((*self.script.texts[name].pieces, *word.pieces), line)
        self.script.texts[name] = word

    def _array(self) -> list[Word]:
        began, words = self.line, list[Word]()
        self.at += 1
        while True:
            if self.at >= len(self.text):
                raise self.error(began, "a bracket is not closed")
            if self.text[self.at] == ")":
                self.at += 1
                return words
            if self.text[self.at] == "\n":
                self._newline()
            elif self._between():
                raise self.error(self.line, "an array holds words only")
            elif not self.text.startswith(_BETWEEN, self.at) and self.at < len(self.text):
                words += self._word()

    # ---- one word ----------------------------------------------------------------------------------------------------

    def _word(self, splits: bool = True, assigned: str = "") -> list[Word]:
        """The word that begins here; several where an array is put in. assigned: the variable that it is a value of."""
        began, pieces, whole, size = self.line, list[Piece](), list[Word](), 0
        quoted, opened = False, began

        def put(text: str, line: int, unknown: str = "") -> None:
            nonlocal size
            size += len(text)
            if size > LONGEST_LINE:
                raise self.error(self.line, f"a word expands to more than {LONGEST_LINE} characters")
            pieces.append(Piece(text, line, unknown))

        while self.at < len(self.text):
            char, line = self.text[self.at], self.line
            plain = _PLAIN.match(self.text, self.at)
            if plain:
                put(plain[0], line)
                self.at = plain.end()
            elif char == "'" and not quoted:
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise self.error(line, "a ' is not closed")
                put(self.text[self.at + 1 : end], line)
                self.line += self.text.count("\n", self.at, end)
                self.at = end + 1
            elif char == '"':
                quoted, opened = not quoted, line
                self.at += 1
                if not pieces:
                    put("", line)
            elif char == "\\":
                self._escaped(quoted, put)
            elif char == "`" or self.text.startswith("$(", self.at):
                for piece in self._substituted(assigned):
                    put(piece.text, piece.line, piece.unknown)
            elif char == "$":
                whole += self._variable(quoted, put, pieces, splits)
            elif not quoted and char in " \t\n;&|()<>":
                break
            else:
                put(char, line)
                self.at += 1
                self.line += char == "\n"
        if quoted:
            raise self.error(opened, 'a " is not closed')
        return [*whole, Word(tuple(pieces), began)] if pieces or not whole else whole

    def _escaped(self, quoted: bool, put: Put) -> None:
        following = self.text[self.at + 1 : self.at + 2]
        if following == "\n":
            self.line += 1
        elif quoted and following not in ("$", "`", '"', "\\"):
            put("\\" + following, self.line)
        else:
            put(following, self.line)
        self.at += 2

    def _variable(self, quoted: bool, put: Put, pieces: list[Piece], splits: bool) -> list[Word]:
        """Puts the value of a variable in; the words that end with it where it is an array."""
        line, found = self.line, _VARIABLE.match(self.text, self.at)
        if found is None:
            if self.text.startswith("$'", self.at) and not quoted:
                raise self.error(line, "text in $'...' is not read; write it in plain quotes")
            put("$", line)
            self.at += 1
            return []
        self.at = found.end()
        name, is_array = found[1] or found[2], bool(found[3])
        if is_array and name in self.script.arrays and splits:
            words, pieces[:] = [*self.script.arrays[name]], [piece for piece in pieces if piece.text]
            return words
        if name not in self.script.texts or is_array:
            put("", line, found[0])
            return []
        value = self.script.texts[name]
        if quoted or not splits or value.unknown:
            for piece in value.pieces:
                put(piece.text, piece.line, piece.unknown)
            return []
        parts = [(number, part) for number, said in value.lines() for part in said.split()]
        if len(parts) > 1 and not any(piece.text for piece in pieces):
            pieces.clear()
            return [Word((Piece(part, number),), number) for number, part in parts]
        for number, part in parts:
            put(part, number)
        return []

    def _bounded(self, pieces: tuple[Piece, ...], line: int) -> Word:
        if sum(len(piece.text) for piece in pieces) > LONGEST_LINE:
            raise self.error(line, f"a variable grows to more than {LONGEST_LINE} characters")
        return Word(pieces, line)

    # ---- command substitutions ---------------------------------------------------------------------------------------

    def _substituted(self, assigned: str) -> tuple[Piece, ...]:
        """What stands for a command substitution, which is skipped."""
        line, began = self.line, self.at
        if self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            if end < 0:
                raise self.error(line, "a ` is not closed")
            inside, self.at = self.text[began + 1 : end], end + 1
        else:
            end = self._closing(began + 2, line)
            inside, self.at = self.text[began + 2 : end], end + 1
        self.line += self.text.count("\n", began, self.at)
        kept = self.script.texts.get(assigned)
        if kept is not None and joins_rules(inside, assigned):
            return kept.pieces
        shown = " ".join(self.text[began : min(self.at, began + 1000)].split())
        return (Piece("", line, shown if len(shown) <= 80 else shown[:77] + "..."),)

    def _closing(self, at: int, line: int) -> int:
        """Where the bracket closes that opens before `at`."""
        depth, quote = 1, ""
        while at < len(self.text):
            char = self.text[at]
            if quote:
                if char == "\\" and quote == '"':
                    at += 1
                elif char == quote:
                    quote = ""
            elif char in "'\"":
                quote = char
            elif char == "\\":
                at += 1
            elif char in "()":
                depth += 1 if char == "(" else -1
                if depth == 0:
                    return at
            at += 1
        raise self.error(line, "a $( is not closed")


def joins_rules(command: str, variable: str) -> bool:
    """Whether a pipeline does nothing to a variable's text but drop its comments and join its lines by commas."""
    try:
        stages = _pipeline(command)
    except RecipeError:
        return False
    if not stages or [word.shown for word in stages[0][1:]] != [f"${variable}"] or len(stages) < 2:
        return False
    return stages[0][0].text == "echo" and all(map(_only_joins, stages[1:]))


def _pipeline(command: str) -> list[list[Word]]:
    return read_script(re.sub(r"\$\{(\w+)\}", r"$\1", command.strip()), "").commands


def _only_joins(words: Sequence[Word]) -> bool:
    tool, *arguments = [word.text for word in words]
    scripts = [word for word in arguments if not re.fullmatch(r"-[A-Za-z]+", word)]
    flags = set("".join(word[1:] for word in arguments if re.fullmatch(r"-[A-Za-z]+", word)))
    if tool == "grep":
        return "v" in flags and flags <= set("vEe") and all(map(_COMMENT_LINES.fullmatch, scripts))
    if tool == "tr":
        return scripts in (["\\n", ","],)
    if tool != "sed" or not flags <= set("Eznre"):
        return False
    parts = [part for script in scripts for part in script.split(";") if part.strip()]
    found = [re.fullmatch(r"\s*s(.)(.*)\1(.*)\1g?\s*", part) for part in parts]
    return all(one is not None and (one[2], one[3]) in _JOINS for one in found)
