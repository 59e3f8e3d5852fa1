"""llama-perplexity's file of base logits: read and written a chunk at a time.

`_logits_`, u32 n_ctx, i32 n_vocab, i32 n_chunk, i32 tokens [n_chunk * n_ctx]; then one record for every counted
position: two f32 (scale, lowest log-probability) and n_vocab u16 codes q, rounded up to an even number, with
log p = scale * q + lowest. What lies more than 16 nats under the largest logit is clipped to that (24 in ik_llama.cpp),
so a record's probabilities sum to a little more than 1 and are used as they are.

Of a chunk of n_ctx tokens the positions n_ctx/2 <= i < n_ctx - 1 are counted: they have at least half a chunk of
context and a next token.
"""

from __future__ import annotations

import struct
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from recompile.errors import CheckpointError, OutputError
from recompile.io.files import write_atomically

MAGIC = b"_logits_"
CLIP_NATS = {"llama.cpp": 16.0, "ik_llama.cpp": 24.0}
LEVELS = np.float32(65535)
LARGEST = 1 << 28  # no count in a header is larger; a hostile file asks for no memory


def counted(n_ctx: int) -> tuple[int, int]:
    """First and last + 1 of a chunk's positions that count: (n_ctx / 2, n_ctx - 1)."""
    return n_ctx // 2, n_ctx - 1


def record_codes(n_vocab: int) -> int:
    """u16 numbers in one record, with scale and lowest in front: 2 * ceil(n_vocab / 2) + 4."""
    return 2 * ((n_vocab + 1) // 2) + 4


def exp_f32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp, rounded right: numpy's own float32 exp is off by up to two units, which shows in the last printed digits."""
    wide: NDArray[np.float64] = values.astype(np.float64)
    return np.exp(wide, out=wide).astype(np.float32)


def log_sum_exp(logits: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """log of sum exp(logits - largest), added up in float64.

    logits, largest: float32 [positions, n_vocab] and [positions]; returns float32 [positions]
    """
    return np.log(exp_f32(logits - largest[:, None]).sum(1, dtype=np.float64)).astype(np.float32)


def encode(logits: NDArray[np.float32], clip_nats: float) -> NDArray[np.uint16]:
    """Records of logits: float32 [positions, n_vocab] -> uint16 [positions, record_codes(n_vocab)]."""
    positions, n_vocab = logits.shape
    largest = logits.max(1, keepdims=True)
    lowest = np.maximum(logits.min(1, keepdims=True), largest - np.float32(clip_nats))
    log_total = log_sum_exp(logits, largest[:, 0])[:, None]
    scale = (largest - lowest) / LEVELS
    head = np.concatenate([scale, lowest - largest - log_total], 1)  # [positions, 2]
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(inverse * np.maximum(logits - lowest, np.float32(0)))  # to the nearest, halves to even
    out = np.zeros((positions, record_codes(n_vocab)), np.uint16)
    out[:, :4] = head.view(np.uint16)
    out[:, 4 : 4 + n_vocab] = codes
    return out


def decode(records: NDArray[np.uint16], n_vocab: int) -> NDArray[np.float32]:
    """Log-probabilities of records, not renormalized: uint16 [positions, codes] -> float32 [positions, n_vocab]."""
    head = np.ascontiguousarray(records[:, :4]).view(np.float32)
    log_p = records[:, 4 : 4 + n_vocab].astype(np.float32)
    log_p *= head[:, :1]
    log_p += head[:, 1:]
    return log_p


@dataclass(frozen=True)
class BaseLogits:
    """An opened file; records are read (memory-mapped) when asked for."""

    path: Path
    n_ctx: int
    n_vocab: int
    tokens: NDArray[np.int32]  # [chunks, n_ctx], as the text has them (no BOS put in)
    _records: NDArray[np.uint16]  # memory-mapped [chunks, positions, codes]

    @property
    def chunks(self) -> int:
        return len(self.tokens)

    def records(self, chunk: int) -> NDArray[np.uint16]:
        """uint16 [positions, codes] of one chunk."""
        return np.asarray(self._records[chunk])


def open_base_logits(path: Path | str) -> BaseLogits:
    """Open a base file. Raises CheckpointError for one that is no such file, or that is cut off."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(20)
            if len(head) < 20 or head[:8] != MAGIC:
                raise CheckpointError(
                    f"{path}: it does not begin with {MAGIC.decode()}; wanted what llama-perplexity "
                    f"--save-all-logits or model_diff --save-all-logits writes"
                )
            n_ctx, n_vocab, chunks = struct.unpack("<Iii", head[8:])
            if not (2 <= n_ctx < LARGEST and 1 <= n_vocab < LARGEST and 0 < chunks < LARGEST):
                raise CheckpointError(f"{path}: its header says n_ctx {n_ctx}, n_vocab {n_vocab}, {chunks} chunks")
            start, end = counted(n_ctx)
            shape = (chunks, end - start, record_codes(n_vocab))
            offset = 20 + 4 * chunks * n_ctx
            wanted = offset + 2 * int(np.prod(shape, dtype=np.int64))
            if size < wanted:
                raise CheckpointError(
                    f"{path}: {size} bytes, wanted {wanted} for {chunks} chunks of {n_ctx} tokens; it was cut off, "
                    f"write it again"
                )
            tokens = np.fromfile(file, np.int32, chunks * n_ctx).reshape(chunks, n_ctx)
        records = np.memmap(path, np.uint16, "r", offset, shape)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if int(tokens.min()) < 0 or int(tokens.max()) >= n_vocab:
        raise CheckpointError(
            f"{path}: its tokens run from {tokens.min()} to {tokens.max()}, its vocabulary has {n_vocab}"
        )
    return BaseLogits(path, n_ctx, n_vocab, tokens, records)


class BaseLogitsWriter:
    """Writes a base file chunk by chunk, beside its final name; renamed when all chunks are there.

    tokens: int32 [chunks, n_ctx]
    """

    def __init__(self, path: Path | str, tokens: NDArray[np.int32], n_vocab: int) -> None:
        self.path, self.n_vocab = Path(path), n_vocab
        self.chunks, self.n_ctx = tokens.shape
        self._tokens = np.ascontiguousarray(tokens, np.int32)
        self._file: IO[bytes] | None = None
        self._written = 0
        self._stack = ExitStack()

    def __enter__(self) -> BaseLogitsWriter:
        self._file = self._stack.enter_context(write_atomically(self.path))
        try:
            self._file.write(MAGIC + struct.pack("<Iii", self.n_ctx, self.n_vocab, self.chunks))
            self._file.write(self._tokens.tobytes())
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        return self

    def append(self, records: NDArray[np.uint16]) -> None:
        """The next records, uint16 [positions, codes], in the order of chunks and positions."""
        assert self._file is not None
        assert records.shape[1] == record_codes(self.n_vocab)
        try:
            self._file.write(np.ascontiguousarray(records).tobytes())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._written += len(records)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        start, end = counted(self.n_ctx)
        if kind is None:
            assert self._written == self.chunks * (end - start), "not every counted position was written"
        self._stack.__exit__(kind, value, trace)
