"""Token rows as a user asks for them: how many, how long, of which text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import ArgumentError, MismatchError, RecompileError

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.model.texts import TextSource
    from recompile.model.tokens import Rows
    from recompile.model.trace import Trace

SMALL_TEXT = 2**24  # bytes, so that finding the roles of its documents takes little memory


@dataclass(frozen=True)
class RowOptions:
    """Where token rows come from: the default text, or one of text, dataset and input_ids."""

    rows: int | None  # None: all there are
    length: int  # tokens in a row
    text: Path | None = None  # a UTF-8 file
    dataset: str | None = None  # of the `datasets` library
    input_ids: Path | None = None  # safetensors, key input_ids, int64 [rows, tokens]
    trace: Path | None = None  # of model_trace
    positions: str = "response"  # of a trace, that count: "response" or "all"

    def read(self, directories: Sequence[Path], role: str, rows: int | None = None) -> tuple[Rows, int | None]:
        """As `read_rows`, of a role; rows: as many instead. Those of a trace end after `length` tokens."""
        self.check()
        if self.trace is not None:
            return trace_rows(self.trace, directories, role, rows or self.rows, self.positions, self.length)
        return read_rows(directories, role, rows or self.rows, self.length, self.text, self.dataset, self.input_ids)

    def read_own(self, directories: Sequence[Path], role: str) -> tuple[Rows, int | None]:
        """As `read`, where the user's own text is not split into roles; a trace always is, and its rows are whole,
        short ones first."""
        self.check()
        if self.trace is not None:
            found, vocab = trace_rows(self.trace, directories, role, self.rows, self.positions)
            return found.by_length(), vocab
        given = (self.rows, self.length, self.text, self.dataset, self.input_ids)
        return read_rows(directories, role, *given, split_own_text=False)

    def check(self) -> None:
        """Raise ArgumentError for arguments that exclude each other, RecompileError for rows of no length."""
        from recompile.model.tokens import check_shape

        if self.positions not in ("response", "all"):
            raise ArgumentError(f'{{positions}} "{self.positions}": wanted response or all')
        given = _named(text=self.text, dataset=self.dataset, input_ids=self.input_ids)
        if self.trace is not None and given:
            raise ArgumentError(f"{{trace}} takes the place of {' and '.join(given)}; give one of them")
        _check_one(given)
        if self.trace is None and self.input_ids is None:
            check_shape(self.rows, self.length)

    def read_up_to(self, directories: Sequence[Path], role: str, most: int, least: int) -> Rows:
        """`most` rows, or as many as the text has. Raises RecompileError for fewer than `least`."""
        if self.trace is not None:
            found = self.read(directories, role, most)[0]
            if len(found.ids) < least:
                raise RecompileError(
                    f'{self.trace}: {len(found.ids)} rows have the role "{role}", and {least} are needed; trace more '
                    f"prompts, or give a larger {{length}}"
                )
            return found
        try:
            return self.read(directories, role, most)[0]
        except RecompileError:  # a short text, which is read again at little cost
            self.read(directories, role, least)
            return read_rows(directories, role, None, self.length, self.text, self.dataset, self.input_ids)[0]


def read_rows(
    model_dirs: Sequence[Path],
    role: str,
    rows: int | None,
    length: int,
    text: Path | None = None,
    dataset: str | None = None,
    input_ids: Path | None = None,
    *,
    split_own_text: bool = True,
) -> tuple[Rows, int | None]:
    """Token rows as asked for (rows None: all there are; of input_ids at most so many), and the tokenizer's true
    vocabulary (None where no tokenizer was needed).

    The tokenizer is that of the first directory that has one. `split_own_text`: whether the user's own text is split
    into roles as the default text is (else all of it is used in order).
    """
    from recompile.model import texts, tokens

    _check_one(_named(text=text, dataset=dataset, input_ids=input_ids))
    if input_ids is not None:
        found = tokens.rows_from_file(input_ids)
        if found.role not in ("all", role):
            raise MismatchError(
                f'{input_ids}: its rows have the role "{found.role}", and are to be used in the role "{role}"; a row '
                f"has one role: give rows that are for this"
            )
        return found if rows is None else found.part(0, min(rows, len(found.ids))), None
    if text is not None:
        source = texts.text_from_file(text)
    elif dataset is not None:
        source = texts.text_from_dataset(dataset)
    else:
        source = texts.default_text()
    own = text is not None or dataset is not None
    taken = "all" if own and not split_own_text else role
    return rows_of_text(source, first_with_tokenizer(model_dirs), rows, length, taken)


def _named(**arguments: object) -> list[str]:
    """The arguments that are given, as messages name them."""
    return [f"{{{name}}}" for name, value in arguments.items() if value is not None]


def _check_one(given: Sequence[str]) -> None:
    """Raise ArgumentError where rows are to come from two places. given: of text, dataset and input_ids, as named"""
    if len(given) > 1:
        raise ArgumentError(f"{', '.join(given[:-1])} and {given[-1]} exclude each other; give one of them")


def trace_rows(
    path: Path, model_dirs: Sequence[Path], role: str, rows: int | None, positions: str, length: int | None = None
) -> tuple[Rows, int]:
    """The rows of one role of a trace, at most so many, in its order, and the vocabulary that it was written with.

    length: rows end after so many tokens, and those whose response begins later are left out. Raises MismatchError
    where a model's tokenizer is another than the trace's, RecompileError for a role without rows.
    """
    from recompile.model.tokenizer import tokenizer_sha256, with_tokenizer
    from recompile.model.tokens import Rows, rows_sha256
    from recompile.model.trace import check_trace_vocabulary, read_trace

    trace = read_trace(path)
    about = trace.about
    theirs = about.tokenizer_sha256
    ours = tokenizer_sha256(first_with_tokenizer(model_dirs))
    if ours and theirs and ours.startswith("gguf:") == theirs.startswith("gguf:") and ours != theirs:
        raise MismatchError(
            f"{path}: was written with another tokenizer than that of {first_with_tokenizer(model_dirs)}; trace this "
            f"model's base"
        )
    vocab = about.vocab
    if not vocab:
        vocab = with_tokenizer(first_with_tokenizer(model_dirs), len)
        check_trace_vocabulary(path, trace.ids, vocab)
    of_role = trace.of_role(role)
    if not len(of_role.ids):
        raise RecompileError(
            f'{path}: no row has the role "{role}" ({", ".join(f"{its}: {n}" for its, n in trace.counts.items())}); '
            f"trace more prompts"
        )
    short = of_role if length is None else of_role.cut(length)
    if not len(short.ids):
        raise RecompileError(
            f'{path}: no response of the role "{role}" begins within {length} tokens; give a larger {{length}}'
        )
    found = short.first(rows)
    counted = found.counted(positions)
    made = Rows(
        found.ids,
        documents=tuple(f"prompt-{prompt[:16]}" for prompt in found.about.prompts),
        origins=found.about.kinds,
        source=f"{path.name}, {about.origin}{_cut_in_words(of_role, length)}",
        role=role,
        sha256=rows_sha256(found.ids, counted),
        lengths=found.lengths,
        counted=counted,
        positions=positions,
    )
    return made, vocab


def _cut_in_words(whole: Trace, length: int | None) -> str:
    """What a limit on the length of rows takes from the rows of a role."""
    if length is None or not bool((whole.lengths > length).any()):
        return ""
    late = len(whole.ids) - len(whole.cut(length).ids)
    left_out = f"; {late} of {len(whole.ids)} rows answer later and are left out" if late else ""
    return f", cut at {length} tokens{left_out}"


def rows_of_text(source: TextSource, model_dir: Path, rows: int | None, length: int, role: str) -> tuple[Rows, int]:
    """Rows of a text (`tokens.make_rows`) and the size of the vocabulary, by the tokenizer of a model's directory,
    which runs in a child process with limits."""
    from recompile.model import texts, tokenizer, tokens

    def work(tokenizer: Any) -> tuple[Rows, int]:
        return tokens.make_rows(source, tokenizer, rows, length, role), len(tokenizer)

    text_bytes = sum(len(document.text) for document in source.documents)
    if role != "all" and text_bytes <= SMALL_TEXT:
        texts.assign_roles(source)  # kept here, where every child would find them anew
    return tokenizer.with_tokenizer(model_dir, work, text_bytes=text_bytes)


def first_with_tokenizer(model_dirs: Sequence[Path]) -> Path:
    """The first directory or GGUF file that has a tokenizer; the first of all where none has."""
    for directory in model_dirs:
        if directory.suffix == ".gguf":
            return directory
        if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return directory
    return model_dirs[0]  # its error says what is missing


def check_vocabulary(checkpoint: Checkpoint, vocab: int | None) -> int | None:
    """The true vocabulary: the tokenizer's where the model pads it. Raises MismatchError for a tokenizer too large."""
    config = checkpoint.config
    nested = config.get("text_config")
    size = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)
    if vocab is not None and isinstance(size, int) and vocab > size:
        raise MismatchError(
            f"{checkpoint.label}: the tokenizer has {vocab} tokens, the model's vocabulary {size}; "
            f"it is the wrong tokenizer for this model"
        )
    return vocab
