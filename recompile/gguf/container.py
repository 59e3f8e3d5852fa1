"""The GGUF container: read lazily with every count checked, written with the key section kept byte for byte.

From the GGUF format spec, section 1. All integers are little-endian. A file is: `GGUF`, version, counts, key records,
tensor infos, padding, tensor data. A model may be cut in several files ("splits"), of which the first holds the keys.

Nothing of the data is read until asked for. Imports no torch.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recompile.errors import CheckpointError, MissingWeight, OutputError
from recompile.formats.gguf_types import BY_ID, GgufType
from recompile.io.files import open_regular, write_atomically

MAGIC = b"GGUF"
VERSION = 3
VERSIONS = (2, 3)  # 2 has the same layout; 1 has 32-bit counts, and no engine reads it any more
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # engines keep names in 64 bytes
MAX_KEY_BYTES = 65535  # of a key's name
MAX_KEY_SECTION_BYTES = 2**30  # all keys; a tokenizer takes 10 MB
MAX_STRINGS = 2**25  # of one array; vocabularies have 2^18

# Value types -> struct code; 8 is a string, 9 an array.
SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPE_NAMES = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array",
    10: "u64", 11: "i64", 12: "f64",
}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor info and where its bytes are."""

    name: str
    type: GgufType
    ne: tuple[int, ...]  # fastest axis first
    path: Path
    offset: int  # of the first byte, from the start of the file
    size_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest axis first, as torch has it: [out, in] for a weight."""
        return tuple(reversed(self.ne))

    @property
    def numel(self) -> int:
        return math.prod(self.ne)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / max(1, self.numel)


@dataclass(frozen=True)
class GgufKey:
    """One key record; start, value_start and stop are places in the key section of its file."""

    name: str
    type: int
    start: int
    value_start: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """A model in one GGUF file or in several splits, opened lazily."""

    label: str  # as the user wrote it
    paths: tuple[Path, ...]
    version: int
    alignment: int
    key_section: bytes = field(repr=False)  # all key records of the first file, as stored
    keys: Mapping[str, GgufKey] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @property
    def path(self) -> Path:
        return self.paths[0]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key as Python has it (int, float, bool, str, list); `default` where there is no such key."""
        found = self.keys.get(key)
        if found is None:
            return default
        return _decode_value(self.key_section, found.value_start, found.type, f"{self.label}: key {key}")

    def require(self, key: str) -> Any:
        """As `value`. Raises CheckpointError where there is no such key."""
        if key not in self.keys:
            raise CheckpointError(f"{self.label}: has no key {key}, which is needed to read it as a model")
        return self.value(key)

    def record(self, key: str) -> bytes:
        """The whole record of a key, as stored."""
        found = self.keys[key]
        return self.key_section[found.start : found.stop]

    def records(self, drop: Iterable[str] = ()) -> dict[str, bytes]:
        """Every record in order, without those to drop."""
        dropped = set(drop)
        return {name: self.record(name) for name in self.keys if name not in dropped}

    def tensor(self, name: str) -> GgufTensor:
        found = self.tensors.get(name)
        if found is None:
            raise MissingWeight(f"{self.label}: holds no tensor {name}")
        return found

    def read(self, tensor: GgufTensor | str) -> bytes:
        """The bytes of one tensor as stored. Raises CheckpointError where the file ends early."""
        info = self.tensor(tensor) if isinstance(tensor, str) else tensor
        try:
            with info.path.open("rb") as file:
                file.seek(info.offset)
                raw = file.read(info.size_bytes)
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
        if len(raw) != info.size_bytes:
            raise CheckpointError(f"{info.path}: ends inside tensor {info.name}; was it changed while open?")
        return raw

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that begins like a GGUF file or is named like one."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def find_gguf(directory: str | os.PathLike[str]) -> Path | None:
    """The one GGUF model in a directory: its only .gguf file, or the first of its splits; None if there is none.

    Raises CheckpointError where there are several models."""
    found = sorted(Path(directory).glob("*.gguf"))
    firsts = [path for path in found if (match := _SPLIT_NAME.fullmatch(path.name)) is None or int(match[2]) == 1]
    if not found:
        return None
    if len(firsts) > 1:
        raise CheckpointError(
            f"{os.fspath(directory)}: holds {len(firsts)} GGUF models ({', '.join(path.name for path in firsts[:4])}); "
            f"name one of the files"
        )
    return (firsts or found)[0]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file and, where it is one of several splits, all of them. Reads headers only.

    Raises CheckpointError, with the file and the place in it, for everything that the format forbids: other magic or
    version, counts and lengths that the file cannot hold, unknown types, tensors that are named twice, overlap, end
    after the file or do not hold whole blocks, an alignment that is no power of two, and splits that are missing.
    """
    label = os.fspath(path)
    first = Path(path).expanduser()
    match = _SPLIT_NAME.fullmatch(first.name)
    if match is not None and int(match[2]) > 1:  # any of the splits stands for the model
        start = first.with_name(f"{match[1]}-{1:05d}-of-{match[3]}.gguf")
        if not start.is_file():
            raise CheckpointError(f"{label}: is split {int(match[2])} of {int(match[3])}, and {start.name} is missing")
        first = start
    file = _read_file(first, label)
    count = file.value("split.count", 0)
    if not isinstance(count, int) or isinstance(count, bool):
        raise CheckpointError(f"{label}: split.count is {count!r}, wanted a number")
    match = _SPLIT_NAME.fullmatch(first.name)
    named = int(match[3]) if match is not None else 1
    if count < 0 or (count == 0 and ("split.count" in file.keys or named > 1)) or (count == 1 and named > 1):
        said = f"split.count is {count}" if "split.count" in file.keys else "it has no split.count"
        raise CheckpointError(f"{label}: its name says it is one of {named} splits, and {said}; write it again")
    if count <= 1:
        total = file.value("split.tensors.count")
        if total is not None and total != len(file.tensors):
            raise CheckpointError(
                f"{label}: holds {len(file.tensors)} tensors, split.tensors.count is {total}: it is a part of a model "
                f"that was split; join it with the other splits"
            )
        return file
    match = _SPLIT_NAME.fullmatch(first.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{label}: is one of {count} splits and is not named NAME-00001-of-{count:05d}.gguf, so that the others "
            f"cannot be found; give it its name back"
        )
    paths = [first.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [split.name for split in paths if not split.is_file()]
    if missing:
        raise CheckpointError(
            f"{label}: {len(missing)} of its {count} splits are missing, first {missing[0]}; download or write it again"
        )
    tensors = dict(file.tensors)
    for number, split in enumerate(paths):
        other = file if number == 0 else _read_file(split, str(split))
        found = other.value("split.no"), other.value("split.count")
        if found != (number, count):
            raise CheckpointError(
                f"{split}: says it is split {found[0]} of {found[1]} counting from 0, its name says {number} of {count}"
            )
        for name, tensor in other.tensors.items() if number else ():
            if name in tensors:
                raise CheckpointError(f"{split}: tensor {name} is in {tensors[name].path.name} as well")
            tensors[name] = tensor
    total = file.value("split.tensors.count")
    if total is not None and total != len(tensors):
        raise CheckpointError(
            f"{label}: its {count} splits hold {len(tensors)} tensors, split.tensors.count is {total}"
        )
    return replace(file, paths=tuple(paths), tensors=tensors)


def _read_file(path: Path, label: str) -> GgufFile:
    with _mapped(path, label) as data:
        return _Header(data, path, label).read()


@contextmanager
def _mapped(path: Path, label: str) -> Iterator[mmap.mmap | bytes]:
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{label}: is empty; download or write it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror or error}") from error
    with mapped:
        yield mapped


class _Header:
    """A cursor over the header of one file; every read is checked against the size of the file."""

    def __init__(self, data: mmap.mmap | bytes, path: Path, label: str) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.label = label
        self.at = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: {what}")

    def take(self, code: str, what: str) -> Any:
        count = struct.calcsize(f"<{code}")
        if self.at + count > self.size:
            raise self.fail(f"truncated: it ends at byte {self.size}, inside {what}; download or write it again")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += count
        return value

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(
                f"{what} asks for {count} bytes at byte {self.at} of a file of {self.size}; the file is truncated or "
                f"damaged, download or write it again"
            )
        self.at += count

    def text(self, what: str, limit: int) -> str:
        length = self.take("Q", what)
        start = self.at
        self.skip(length, what)
        if length > limit:
            raise self.fail(f"{what} is {length} bytes long, at most {limit} are allowed")
        try:
            return bytes(self.data[start : self.at]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8 text") from error

    def read(self) -> GgufFile:
        self.check_start()
        version = self.take("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            hint = "a big-endian file: convert it to little-endian" if swapped else "convert the model again"
            raise self.fail(f"GGUF version {version}, wanted {' or '.join(map(str, VERSIONS))}; {hint}")
        tensor_count = self.take("Q", "the number of tensors")
        key_count = self.take("Q", "the number of keys")
        # The shortest records: a key of one letter and a byte; a tensor of one letter without axes.
        self.check_count("keys", key_count, 8 + 1 + 4 + 1)
        self.check_count("tensors", tensor_count, 8 + 1 + 4 + 4 + 8)
        base = self.at
        keys = self.read_keys(key_count, base)
        section = bytes(self.data[base : self.at])
        alignment = DEFAULT_ALIGNMENT
        if "general.alignment" in keys:
            found = keys["general.alignment"]
            if found.type not in (2, 4, 10):
                raise self.fail(f"key general.alignment is a {TYPE_NAMES[found.type]}, wanted a u32")
            alignment = _decode_value(section, found.value_start, found.type, self.label)
        if alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment}, wanted a power of two")
        tensors = self.read_tensors(tensor_count, alignment)
        return GgufFile(self.label, (self.path,), version, alignment, section, keys, tensors)

    def check_start(self) -> None:
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            raise self.fail(f"not a GGUF file: it begins with {magic!r}, wanted {MAGIC!r}")
        self.at = 4

    def check_count(self, what: str, count: int, shortest: int) -> None:
        left = self.size - self.at
        if count * shortest > left:
            raise self.fail(
                f"says it holds {count} {what}, and has {left} bytes left for them; the file is truncated or damaged, "
                f"download or write it again"
            )

    def read_keys(self, count: int, base: int) -> dict[str, GgufKey]:
        keys: dict[str, GgufKey] = {}
        for number in range(count):
            start = self.at
            name = self.text(f"the name of key {number}", MAX_KEY_BYTES)
            kind = self.take("I", f"the type of key {name}")
            value_start = self.at
            self.skip_value(kind, f"key {name}")
            if name in keys:
                raise self.fail(f"key {name} is there twice; the file is damaged, write it again")
            if self.at - base > MAX_KEY_SECTION_BYTES:
                raise self.fail(
                    f"the keys up to {name} take more than {MAX_KEY_SECTION_BYTES} bytes; the file is damaged"
                )
            keys[name] = GgufKey(name, kind, start - base, value_start - base, self.at - base)
        return keys

    def skip_value(self, kind: int, what: str) -> None:
        if kind in SCALARS:
            self.skip(struct.calcsize(f"<{SCALARS[kind]}"), what)
        elif kind == STRING:
            self.skip(self.take("Q", what), what)
        elif kind == ARRAY:
            element = self.take("I", what)
            count = self.take("Q", what)
            if element in SCALARS:
                self.skip(count * struct.calcsize(f"<{SCALARS[element]}"), f"{what} ({count} numbers)")
            elif element == STRING:
                if count > MAX_STRINGS:
                    raise self.fail(f"{what} asks for {count} strings, at most {MAX_STRINGS} are read here")
                if count * 8 > self.size - self.at:
                    raise self.fail(f"{what} asks for {count} strings in the {self.size - self.at} bytes that are left")
                self.skip_strings(count, what)
            else:
                raise self.fail(f"{what} is an array of type {element}, wanted numbers or strings")
        else:
            raise self.fail(f"{what} has value type {kind}, known: 0 to 12")

    def skip_strings(self, count: int, what: str) -> None:
        data, size, at = self.data, self.size, self.at
        unpack = struct.Struct("<Q").unpack_from
        for number in range(count):
            if at + 8 > size:
                raise self.fail(f"truncated: it ends at byte {size}, inside string {number} of {what}")
            at += 8 + unpack(data, at)[0]
            if at > size:
                raise self.fail(
                    f"string {number} of {what} ends at byte {at} of a file of {size}; the file is truncated or damaged"
                )
        self.at = at

    def read_tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for number in range(count):
            name = self.text(f"the name of tensor {number}", MAX_NAME_BYTES)
            dims = self.take("I", f"the axes of tensor {name}")
            if not 0 < dims <= MAX_DIMS:
                raise self.fail(f"tensor {name} has {dims} axes, wanted 1 to {MAX_DIMS}")
            ne = tuple(self.take("Q", f"the shape of tensor {name}") for _ in range(dims))
            type_id = self.take("I", f"the type of tensor {name}")
            offset = self.take("Q", f"the offset of tensor {name}")
            if name in found:
                raise self.fail(f"tensor {name} is there twice; the file is damaged, write it again")
            kind = BY_ID.get(type_id)
            if kind is None:
                raise self.fail(
                    f"tensor {name} has type id {type_id}, which is none of llama.cpp's or ik_llama.cpp's types that "
                    f"are known here"
                )
            if any(size < 1 or size >= 1 << 40 for size in ne):
                raise self.fail(f"tensor {name} has shape {list(ne)}, wanted sizes from 1 up")
            if not kind.fits(ne[0]):
                raise self.fail(
                    f"tensor {name} is {kind.name} with rows of {ne[0]} weights, wanted a multiple of {kind.block}"
                )
            if offset % alignment:
                raise self.fail(f"tensor {name} is at offset {offset}, wanted a multiple of {alignment}")
            size_bytes = kind.row_bytes(ne[0]) * math.prod(ne[1:])
            found[name] = GgufTensor(name, kind, ne, self.path, offset, size_bytes)
        start = align(self.at, alignment)
        placed = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}
        self.check_places(placed)
        return placed

    def check_places(self, tensors: Mapping[str, GgufTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.fail(f"tensor {tensor.name} overlaps tensor {before}; the file is damaged, write it again")
            end, before = tensor.offset + tensor.size_bytes, tensor.name
            if end > self.size:
                raise self.fail(
                    f"tensor {tensor.name} ends at byte {end} of a file of {self.size}; it is truncated or damaged, "
                    f"download or write it again"
                )


def _decode_value(section: bytes, at: int, kind: int, what: str) -> Any:
    """A value whose extent was checked when the file was opened."""
    if kind in SCALARS:
        return struct.unpack_from(f"<{SCALARS[kind]}", section, at)[0]
    if kind == STRING:
        return _decode_string(section, at, what)[0]
    element, count = struct.unpack_from("<IQ", section, at)
    at += 12
    if element in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[element]}", section, at))
    values = []
    for _ in range(count):
        value, at = _decode_string(section, at, what)
        values.append(value)
    return values


def _decode_string(section: bytes, at: int, what: str) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", section, at)
    stop = at + 8 + length
    try:
        return section[at + 8 : stop].decode("utf-8"), stop
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: is not UTF-8 text") from error


# ---- writing ---------------------------------------------------------------------------------------------------------


def align(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment


def encode_key(name: str, value: Any, kind: str | None = None) -> bytes:
    """One key record.

    kind: "u32", "f32", "string" ...; for a list the type of its elements. Default: bool, string, f32 for floats,
          u32 (i32 where it is negative, u64 where it is large) for whole numbers.
    """
    return _string(name) + _encode_value(value, kind)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "i32" if value < 0 else "u32" if value < 1 << 32 else "u64"
    if isinstance(value, float):
        return "f32"
    if isinstance(value, str):
        return "string"
    raise TypeError(f"no GGUF value type for {type(value).__name__}")


def _encode_value(value: Any, kind: str | None) -> bytes:
    if isinstance(value, (list, tuple)):
        kinds = [kind or _kind_of(element) for element in value] or [kind or "u32"]
        element = next((k for k in ("f32", "i32", "u64") if k in kinds), kinds[0])
        number = TYPE_NUMBERS[element]
        head = struct.pack("<IIQ", ARRAY, number, len(value))
        if number == STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{SCALARS[number]}", *value)
    number = TYPE_NUMBERS[kind or _kind_of(value)]
    if number == STRING:
        return struct.pack("<I", number) + _string(value)
    return struct.pack(f"<I{SCALARS[number]}", number, value)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its info and, where it is not laid out only, what gives its bytes in order."""

    name: str
    type: GgufType
    ne: tuple[int, ...]  # fastest axis first
    chunks: Callable[[], Iterable[bytes | memoryview]] | None = None

    @property
    def size_bytes(self) -> int:
        return self.type.row_bytes(self.ne[0]) * math.prod(self.ne[1:])


@dataclass(frozen=True)
class Layout:
    """The bytes before the data of one file, and where each tensor's data goes."""

    header: bytes = field(repr=False)  # padded up to the data
    offsets: tuple[int, ...]  # of the tensors' first bytes, from the start of the file
    size_bytes: int  # of the whole file, padding after the last tensor included


def lay_out(
    records: Iterable[bytes], tensors: Sequence[NewTensor], alignment: int = DEFAULT_ALIGNMENT, version: int = VERSION
) -> Layout:
    """Where everything goes: key records as given, infos in the order of the tensors, data behind each other, aligned.

    Raises OutputError for a name that engines cannot hold or that occurs twice.
    """
    records = list(records)
    infos, places, at = [], [], 0
    seen: set[str] = set()
    for tensor in tensors:
        raw = tensor.name.encode("utf-8")
        if len(raw) > MAX_NAME_BYTES or tensor.name in seen:
            what = "occurs twice" if tensor.name in seen else f"is longer than {MAX_NAME_BYTES} bytes"
            raise OutputError(f"the name of GGUF tensor {tensor.name} {what}")
        seen.add(tensor.name)
        ne = tensor.ne
        infos.append(_string(tensor.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.type.type_id, at))
        places.append(at)
        at = align(at + tensor.size_bytes, alignment)
    head = MAGIC + struct.pack("<IQQ", version, len(tensors), len(records)) + b"".join(records) + b"".join(infos)
    head += bytes(align(len(head), alignment) - len(head))
    return Layout(head, tuple(len(head) + place for place in places), len(head) + at)


def write_gguf(
    path: str | Path,
    records: Iterable[bytes],
    tensors: Sequence[NewTensor],
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write one GGUF file, tensor by tensor; it is written beside the name and renamed when whole.

    records: key records, from `encode_key` or `GgufFile.records`
    Raises OutputError if it cannot be written or a tensor's chunks are not as many bytes as its info says.
    """
    layout = lay_out(records, tensors, alignment)
    with write_atomically(path) as file:
        file.write(layout.header)
        for tensor, offset in zip(tensors, layout.offsets, strict=True):
            file.seek(offset)
            assert tensor.chunks is not None, f"{tensor.name} has nothing to write"
            wrote = sum(file.write(chunk) for chunk in tensor.chunks())
            if wrote != tensor.size_bytes:
                raise OutputError(f"{path}: tensor {tensor.name} came as {wrote} bytes, wanted {tensor.size_bytes}")
        file.truncate(layout.size_bytes)
