"""Names and texts from files, as a terminal or a table shows them: nothing in them moves a cursor or hides a word."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, TextIO

# C0 and C1 controls, DEL, marks that turn the direction of text, line and paragraph separators, the byte order mark,
# and surrogates (what Python makes of bytes in file names that are not UTF-8). Tab and newline are a text's own.
_UNSAFE_IN_TEXT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_UNSAFE_IN_NAME = re.compile(f"[\t\n]|{_UNSAFE_IN_TEXT.pattern}")


def printable(name: object) -> str:
    r"""One word or cell for a terminal, a table or a Markdown line: control characters as `\u001b`, on one line."""
    return _UNSAFE_IN_NAME.sub(_escaped, str(name))


def printable_text(text: str) -> str:
    r"""As `printable`, for a text of several lines: newlines and tabs stay."""
    return _UNSAFE_IN_TEXT.sub(_escaped, text)


def is_printable(name: str) -> bool:
    """Whether `printable` would leave a name as it is."""
    return _UNSAFE_IN_NAME.search(name) is None


def _escaped(found: re.Match[str]) -> str:
    return {"\t": "\\t", "\n": "\\n"}.get(found[0], f"\\u{ord(found[0]):04x}")  # what JSON and YAML read back


class PrintableStream:
    """A text stream that escapes what `printable_text` escapes, and what its encoding cannot say (a C locale)."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        shown = printable_text(text)
        encoding = self.raw.encoding or "utf-8"
        try:
            shown.encode(encoding)
        except UnicodeEncodeError:
            shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        self.raw.write(shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __iter__(self) -> Any:
        return iter(self.raw)

    def __enter__(self) -> PrintableStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.flush()
