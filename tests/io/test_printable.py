"""Nothing from a file moves the cursor or hides a word."""

from __future__ import annotations

import io

import pytest

from recompile.errors import RecompileError
from recompile.io.printable import PrintableStream, printable, printable_text
from recompile.io.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("grüße 模型 ± ▶", "grüße 模型 ± ▶"),
        ("\x1b[2Jx", "\\u001b[2Jx"),
        ("a\nError: b", "a\\nError: b"),
        ("a\tb\rc", "a\\tb\\u000dc"),
        ("\u202egnp.exe\u202c", "\\u202egnp.exe\\u202c"),
        ("\x9b31m", "\\u009b31m"),
        ("\udcff", "\\udcff"),
        ("a\0b\x7f", "a\\u0000b\\u007f"),
        ("a\u2028b\ufeff", "a\\u2028b\\ufeff"),
    ],
)
def test_names(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable_text(name) == shown.replace("\\n", "\n").replace("\\t", "\t")


def test_a_stream_that_cannot_say_it() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = PrintableStream(raw)
    stream.write("0.1 ± 0.2 \x1b[2J\n")
    stream.flush()
    assert raw.buffer.getvalue() == b"0.1 \\xb1 0.2 \\u001b[2J\n"  # type: ignore[attr-defined]


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4.5GiB", "1.5G", "900MB", "12")] == [
        int(4.5 * 2**30),
        int(1.5 * 2**30),
        900_000_000,
        12,
    ]
    for text in ("", "x", "nan", "-1G", "1e9", "1XB", "9" * 5000, "1..5G", "\u0661G"):
        with pytest.raises(RecompileError, match="is not a size"):
            parse_size(text)
    assert format_bytes(1536) == "1.50 KiB"
