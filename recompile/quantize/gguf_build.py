"""A plan of GGUF files carried out, tensor by tensor; a killed run goes on where it was."""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.errors import FormatError, OutputError
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_encode import NEEDS_IMPORTANCE, quantize_rows
from recompile.formats.gguf_types import QUANTIZED_TYPES, TYPES, GgufType, find_type
from recompile.gguf.keys import heads_in
from recompile.gguf.names import text_config_of
from recompile.io.files import finished_meanwhile, open_regular, sync_directory
from recompile.io.journal import LineJournal
from recompile.io.schema import read_as
from recompile.quantize.gguf import (
    BUILDING_SUFFIX,
    VOCABULARY,
    BaseTensor,
    Made,
    TensorDone,
    VariantPlan,
    VariantsReport,
    journal_path,
    place_pieces,
)
from recompile.quantize.gguf_compensated import ComparedInputsOfFile
from recompile.quantize.gguf_rounding import Order, layer_of, summary_of

CHUNK_ROWS_BYTES = 1 << 28  # float32 bytes encoded at a time
CHECKED_BYTES = 1 << 24  # read at a time where a run goes on


def build_variants(plan: VariantPlan) -> Iterator[TensorDone | VariantsReport]:
    """Write every file of the plan, yielding after each tensor and last the report.

    Files grow as NAME.building beside a journal, and get their names when whole; the same plan again goes on where it
    was. Raises OutputError where that cannot be written or belongs to other settings, FormatError as encoding does.
    """
    journal = _Journal(plan)
    total = 4 * sum(math.prod(tensor.ne) for tensor in plan.tensors)
    done = 0
    try:
        journal.open()
        for made, number in enumerate(plan.order):
            tensor = plan.tensors[number]
            size = 4 * math.prod(tensor.ne)
            if made >= journal.count:
                journal.add(_build_tensor(plan, number, journal))
            elif plan.feedback is not None and plan.feedback.compensates:
                _keep_again(plan, number, journal)
            done += size
            yield TensorDone(tensor.name, done, total)
        for number, (_, value) in enumerate(plan.extra.items(), len(plan.tensors)):
            for variant, file in zip(plan.variants, journal.files, strict=True):
                _write_at(file, value.float().numpy().tobytes(), variant.layout.offsets[number])
        journal.finish()
    except OSError as error:
        raise OutputError(
            f"{error.filename or plan.variants[0].path}: cannot be written: {error.strerror or error}; make room and "
            f"run the same command again, it goes on from here"
        ) from error
    finally:
        journal.close()
    yield VariantsReport(
        tuple(str(variant.path) for variant in plan.variants),
        {v.preset.name: tuple(entries[n] for entries in journal.made) for n, v in enumerate(plan.variants)},
        plan.left_out,
    )


def _build_tensor(plan: VariantPlan, number: int, journal: _Journal) -> list[_Written]:
    """Encode one tensor for every variant and write it; equal types are encoded once."""
    tensor = plan.tensors[number]
    checksums = [0] * len(plan.variants)
    sizes, unseen = [0] * len(plan.variants), False
    noise, signal = [0.0] * len(plan.variants), 0.0
    offsets = [variant.layout.offsets[number] for variant in plan.variants]
    notes: list[list[str]] = [[] for _ in plan.variants]  # of rounding
    for module, rows in _rows_of(plan.base, tensor):  # the tensor, or its experts one after another
        importance = plan.importance_of(module, tensor)
        looked_up = tensor.name == "token_embd.weight"  # unless it is the head too, it has no inputs to weigh errors by
        unseen = unseen or (plan.is_calibrated and importance is None and not tensor.plain and not looked_up)
        improve = _feedback_of(plan, tensor, module, len(rows))
        compared = _compensated(plan, tensor, module, len(rows))
        if compared is not None:
            rows = compared.aimed(rows)
        step = len(rows) if improve is not None else max(1, CHUNK_ROWS_BYTES // (4 * tensor.ne[0]))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            signal += float(part.double().square().sum())
            encoded: dict[str, tuple[bytes, float, str]] = {}
            for n, variant in enumerate(plan.variants):
                kind = variant.kinds[number]
                if kind.name not in encoded:
                    # a type that has to have importance, where no token came by: every column counts the same
                    flat = importance is None and plan.is_calibrated and kind.name in NEEDS_IMPORTANCE
                    counts = torch.ones(tensor.ne[0]) if flat else importance
                    encoded[kind.name] = _encode(kind, part, counts, tensor.name, improve)
                raw, error, note = encoded[kind.name]
                notes[n] += [note] if note else []
                _write_at(journal.files[n], raw, offsets[n] + sizes[n])
                sizes[n] += len(raw)
                checksums[n] = zlib.crc32(raw, checksums[n])
                noise[n] += error
            if compared is not None:
                compared.keep(plan.variants[0].kinds[number], encoded[plan.variants[0].kinds[number].name][0])
    made = []
    tied = not any(other.name == "output.weight" for other in plan.tensors)
    for n, variant in enumerate(plan.variants):
        kind = variant.kinds[number]
        asked = kind.name if tensor.plain else find_type(variant.preset.wanted(tensor.name, plan.layers, tied)).name
        note = "" if asked == kind.name else f"{asked} has blocks of {TYPES[asked].block}, its rows are {tensor.ne[0]}"
        if unseen and kind.is_quantized:
            note += ("; " if note else "") + "no calibration token reached it: made without importance"
        error = math.sqrt(noise[n] / signal) if signal else 0.0
        its = Made(tensor.name, asked, kind.name, math.prod(tensor.ne), sizes[n], error, note, summary_of(notes[n]))
        made.append(_Written(its, checksums[n]))
    return made


@dataclass(frozen=True)
class _Written:
    """A tensor of one variant, as a line of the journal holds it. crc32: of its bytes in the file."""

    made: Made
    crc32: int


@dataclass(frozen=True)
class _Line:
    variants: tuple[_Written, ...]


Improve = Callable[[GgufType, Tensor, Tensor], tuple[Tensor, str]]


def _feedback_of(plan: VariantPlan, tensor: BaseTensor, module: str, rows: int) -> Improve | None:
    """What chooses better codes for all rows of a map; None where they stay as encoded."""
    order = _order_of(plan, tensor, rows)
    if plan.feedback is None or order is None:
        return None
    return functools.partial(plan.feedback.improve, module=module, layer=layer_of(tensor.name), order=order)


def _order_of(plan: VariantPlan, tensor: BaseTensor, rows: int) -> Order | None:
    """Which rows of the model's matrix those of a map are; None for what is not rounded with feedback."""
    fused = tensor.place.fused
    if plan.feedback is None or tensor.plain or (fused is not None and fused.how == "kv_b"):
        return None  # keys and values of a latent are multiplied the other way round
    whole = rows * (len(fused.parts) if fused is not None else 1)
    return Order.of(tensor.place, heads_in(text_config_of(plan.base.config)), whole, tensor.ne[0])


@dataclass(frozen=True)
class _Compensated:
    """A map of a build whose maps make good the errors before them."""

    inputs: ComparedInputsOfFile
    module: str
    layer: int | None
    order: Order
    columns: int

    def aimed(self, rows: Tensor) -> Tensor:
        return self.inputs.aimed(self.module, self.layer, rows, self.order)

    def keep(self, kind: GgufType, raw: bytes) -> None:
        packed = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        rows = dequantize_rows(kind, packed.view(-1, kind.row_bytes(self.columns)), self.columns)
        self.inputs.keep(self.module, self.layer, rows, self.order)


def _compensated(plan: VariantPlan, tensor: BaseTensor, module: str, rows: int) -> _Compensated | None:
    order = _order_of(plan, tensor, rows)
    if plan.feedback is None or order is None or not isinstance(plan.feedback.inputs, ComparedInputsOfFile):
        return None
    return _Compensated(plan.feedback.inputs, module, layer_of(tensor.name), order, tensor.ne[0])


def _keep_again(plan: VariantPlan, number: int, journal: _Journal) -> None:
    """What an earlier run made gives the maps behind it their inputs, as it did then."""
    tensor, variant = plan.tensors[number], plan.variants[0]
    kind, at = variant.kinds[number], variant.layout.offsets[number]
    for module, rows in _rows_of(plan.base, tensor):
        size = len(rows) * kind.row_bytes(tensor.ne[0])
        compared = _compensated(plan, tensor, module, len(rows))
        if compared is not None:
            compared.keep(kind, os.pread(journal.files[0], size, at))
        at += size


def _encode(
    kind: GgufType, rows: Tensor, importance: Tensor | None, name: str, improve: Improve | None
) -> tuple[bytes, float, str]:
    """The bytes and the squared error of some rows, and what is to be noted."""
    try:
        packed = quantize_rows(kind, rows, importance)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    note = ""
    if improve is not None:
        packed, note = improve(kind, packed, rows)
    dense = dequantize_rows(kind, packed, rows.shape[1])
    return packed.numpy().tobytes(), float((dense - rows).double().square().sum()), note


def _rows_of(base: Checkpoint, tensor: BaseTensor) -> Iterator[tuple[str, Tensor]]:
    """The rows of a tensor as GGUF has them, float32 [rows, ne 0], expert by expert, each with its module's name.

    Those of a GGUF base are what is stored; no order or offset of it is undone and done again."""
    if isinstance(base, GgufCheckpoint):
        for source in tensor.sources:
            yield source.rpartition(".")[0], _stored_rows(base.tensors[source], tensor.ne[0])
        return
    heads, modules = heads_in(text_config_of(base.config)), iter(tensor.modules)
    for source in tensor.sources:
        for piece in place_pieces(base.load(source), tensor.place, heads):
            whole = piece.float().reshape(-1, tensor.ne[0])
            yield next(modules)[0], whole[: tensor.ne[1]] if tensor.name in VOCABULARY else whole


def _stored_rows(info: TensorInfo, columns: int) -> Tensor:
    """float32 [rows, columns] of a tensor in a GGUF file, decoded where it is quantized."""
    stored = read_tensor(info)
    if info.dtype in QUANTIZED_TYPES:
        return dequantize_rows(TYPES[info.dtype], stored.reshape(-1, stored.shape[-1]), columns)
    return stored.float().reshape(-1, columns)


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(file, view, offset)
        view = view[count:]
        offset += count


class _Journal:
    """The unfinished files of a plan and what was made so far."""

    def __init__(self, plan: VariantPlan) -> None:
        self.plan = plan
        self.path = journal_path(plan.variants)
        self.partials = [variant.path.with_name(variant.path.name + BUILDING_SUFFIX) for variant in plan.variants]
        self.files: list[int] = []
        self.made: list[list[Made]] = []
        self._journal: LineJournal | None = None

    @property
    def count(self) -> int:
        return len(self.made)

    def open(self) -> None:
        """Begin, or go on where a killed run of the same settings was. Raises OutputError for one of other settings,
        and where another process is at work."""
        self._journal = LineJournal(self.path, error=OutputError)
        settings = json.loads(json.dumps(self.plan.settings))
        lines = self._journal.values()
        made = next((variant.path for variant in self.plan.variants if variant.path.exists()), None)
        if made is not None and not lines:  # another run renamed it since it was looked for
            self.path.unlink(missing_ok=True)
            raise OutputError(finished_meanwhile(made))
        taken = next((path for path in self.partials if os.path.lexists(path)), None)
        if taken is not None and not lines:  # ours are made after the header
            self.path.unlink(missing_ok=True)
            raise OutputError(f"{taken}: exists and is no unfinished file of this tool; move it away")
        if lines and lines[0] != settings:
            same = isinstance(lines[0], dict) and lines[0].get("base") == settings["base"]
            why = "with other settings" if same else "of another base (or its config or tensors were changed since)"
            raise OutputError(f"{self.path}: an unfinished run {why}; remove it and its *.building files")
        is_whole = len(lines) - 1 == len(self.plan.tensors)  # and some of the files may have their names
        places = [
            variant.path if is_whole and not partial.exists() else partial
            for partial, variant in zip(self.partials, self.plan.variants, strict=True)
        ]
        if made is not None and not (is_whole and all(place.exists() for place in places)):
            raise OutputError(f"{made}: exists, beside {self.path}; remove both, or choose another {{out}}")
        if all(place.exists() for place in places):
            written = [self._entries(number, line) for number, line in enumerate(lines[1:], start=2)]
            self._check_bytes(places, written)
            self.made = [[one.made for one in entries] for entries in written]
        fresh = not self.made
        if fresh:
            self._journal.begin(settings)
        for place, variant in zip(places, self.plan.variants, strict=True):
            flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
            self.files.append(os.open(place, flags, 0o666))
            os.ftruncate(self.files[-1], variant.layout.size_bytes)
            _write_at(self.files[-1], variant.layout.header, 0)

    def _entries(self, number: int, line: Any) -> tuple[_Written, ...]:
        """A line: what was made of one tensor for every variant."""
        place = f"{self.path}:{number}"
        try:
            found = read_as(_Line, line, place, error=OutputError).variants
        except OutputError as error:
            raise OutputError(f"{error}; remove the file and its *.building files") from error
        if len(found) != len(self.plan.variants) or number - 2 >= len(self.plan.order):
            raise OutputError(f"{place}: is no line of this build; remove the file and its *.building files")
        return found

    def _check_bytes(self, places: Sequence[Path], written: Sequence[Sequence[_Written]]) -> None:
        """Raise OutputError where what was made is not what stands in the files."""
        for n, (place, variant) in enumerate(zip(places, self.plan.variants, strict=True)):
            with open_regular(place, error=OutputError) as file:
                for number, entries in zip(self.plan.order, written, strict=False):
                    file.seek(variant.layout.offsets[number])
                    left, found = entries[n].made.size_bytes, 0
                    while left and (part := file.read(min(left, CHECKED_BYTES))):
                        left, found = left - len(part), zlib.crc32(part, found)
                    if left or found != entries[n].crc32 or entries[n].made.tensor != self.plan.tensors[number].name:
                        raise OutputError(
                            f"{place}: {self.plan.tensors[number].name} was changed after it was written (its checksum "
                            f"does not fit); remove it and {self.path} to start again"
                        )

    def add(self, entries: Sequence[_Written]) -> None:
        """A tensor counts as made once its bytes and its line are on disk."""
        assert self._journal is not None
        for file in self.files:
            os.fdatasync(file)
        self.made.append([entry.made for entry in entries])
        self._journal.append({"variants": [asdict(entry) for entry in entries]})

    def finish(self) -> None:
        for file in self.files:
            os.fsync(file)
        for partial, variant in zip(self.partials, self.plan.variants, strict=True):
            if partial.exists():  # else it has its name from a run that was killed here
                os.replace(partial, variant.path)
        sync_directory(self.path.parent)
        self.path.unlink()

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []
        if self._journal is not None:
            self._journal.close()
