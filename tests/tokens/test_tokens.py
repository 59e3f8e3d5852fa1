"""Text -> token rows: cut where they should be, never shared between roles, the same every time."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from recompile.errors import CheckpointError, MismatchError, OutputError, RecompileError
from recompile.model import texts
from recompile.model.texts import (
    ROLE_SHARES,
    Document,
    TextSource,
    assign_roles,
    cut_stretches,
    default_text,
    text_from_dataset,
    text_from_file,
)
from recompile.model.tokenizer import check_tokenizer, load_tokenizer, tokenizer_sha256
from recompile.model.tokens import Rows, check_ids, make_rows, overlap, rows_from_file, save_rows

EOS, BOS, WORDS = 0, 1, 4000


def make_tokenizer(adds_bos: bool = False) -> Any:
    """One token a word: "w17" is token 19."""
    vocab = {"<eos>": EOS, "<bos>": BOS, **{f"w{word}": word + 2 for word in range(WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def make_document(seed: int, words: int, origin: str = "a") -> Document:
    generator = torch.Generator().manual_seed(seed)
    return Document(" ".join(f"w{word}" for word in torch.randint(WORDS, (words,), generator=generator)), origin)


def make_source(documents: int = 60, words: int = 70) -> TextSource:
    return TextSource("made", tuple(make_document(seed, words, "ab"[seed % 2]) for seed in range(documents)))


TOKENIZER = make_tokenizer()


# ---------------------------------------------------------------- rows


def test_rows_of_known_documents() -> None:
    long = Document(" ".join(f"w{word}" for word in range(10)), "a")
    short = [Document("w100 w101", "a"), Document("w200 w201 w202", "a")]
    other = Document("w300 w301 w302 w303 w304", "b")
    rows = make_rows(TextSource("made", (long, short[0], other, short[1])), TOKENIZER, None, 4, "all")
    assert rows.ids.tolist() == [
        [2, 3, 4, 5],  # origins take turns: a, b, a, ...
        [302, 303, 304, 305],
        [102, 103, EOS, 202],  # two short documents
        [6, 7, 8, 9],  # then the second row of the long one; its last two tokens are no row
    ]
    assert rows.ids.dtype == torch.int64
    assert rows.origins == ("a", "b", "a", "a")
    assert rows.documents[0] == rows.documents[3]
    assert rows.documents[2].count("+") == 1
    assert (rows.source, rows.role) == ("made", "all")


def test_a_tokenizer_that_adds_bos_gives_rows_that_start_with_it() -> None:
    source = TextSource("made", (make_document(0, 8),))
    plain = make_rows(source, TOKENIZER, 1, 8, "all").ids[0].tolist()
    assert make_rows(source, make_tokenizer(adds_bos=True), None, 5, "all").ids.tolist() == [
        [BOS, *plain[:4]],
        [BOS, *plain[4:]],
    ]


def test_special_tokens_in_a_text_are_text(base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    rows = make_rows(TextSource("made", (Document("a <|im_end|> b", "a"),)), tokenizer, 1, 8, "all")
    assert tokenizer.eos_token_id not in rows.ids[0].tolist()


def test_fewer_rows_are_the_first_of_more_and_a_seed_changes_the_order_only() -> None:
    source = make_source()
    many, few = (make_rows(source, TOKENIZER, count, 16, "calibrate") for count in (20, 7))
    assert torch.equal(many.ids[:7], few.ids)
    assert many.sha256 == make_rows(source, TOKENIZER, 20, 16, "calibrate").sha256
    assert many.sha256 != few.sha256
    every, other = (make_rows(source, TOKENIZER, None, 16, "calibrate", seed=seed) for seed in (0, 1))
    assert sorted(every.ids.tolist()) == sorted(other.ids.tolist())
    assert every.ids.tolist() != other.ids.tolist()


def test_a_small_sample_holds_many_documents_of_every_origin() -> None:
    rows = make_rows(make_source(), TOKENIZER, 10, 16, "calibrate")
    assert rows.origins == ("a", "b") * 5
    assert len(set(rows.documents)) == 10


class Counting:
    """A tokenizer that knows how much it was given."""

    bos_token_id, eos_token_id, chars = None, EOS, 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.chars += sum(map(len, texts))
        return TOKENIZER(texts, **options)


def test_a_long_text_is_tokenized_no_further_than_needed() -> None:
    counting: Any = Counting()
    text = make_document(0, 200_000).text
    rows = make_rows(TextSource("made", (Document(text, "a"),)), counting, 3, 64, "all")
    assert rows.ids.flatten().tolist() == TOKENIZER(text)["input_ids"][: 3 * 64]
    assert counting.chars < len(text) / 5


@pytest.mark.parametrize(("count", "most"), [(3, 3 * 2000), (40, 40 * 2000), (95, 40 * (2000 + 12_000))])
def test_few_rows_of_many_documents_are_those_of_all_of_their_text(count: int, most: int) -> None:
    """The first row of every document, then its second: whole documents are tokenized for those alone."""
    texts = [make_document(number, 2_000).text for number in range(40)]
    counting: Any = Counting()
    rows = make_rows(TextSource("made", tuple(Document(text, "a") for text in texts)), counting, count, 64, "all")
    whole = [TOKENIZER(text)["input_ids"] for text in texts]
    assert rows.ids.tolist() == [whole[at % 40][64 * (at // 40) :][:64] for at in range(count)]
    assert counting.chars <= most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 64, "report"), r'made: there is text for \d+ rows of 64 tokens for the role "report", and 100 wanted'),
        ((10_000, 64, "all"), r"made: there is text for 60 rows of 64 tokens, and 10000 wanted; ask for fewer"),
        ((1, 9_999, "choose"), "there is text for 0 rows"),
        ((None, 9_999, "choose"), "at least 1 wanted"),
        ((1, 64, "test"), 'unknown role "test"; known: calibrate, choose, accept, report, all'),
        ((0, 64, "all"), "rows 0: wanted at least 1"),
    ],
)
def test_too_little_text_and_wrong_roles(arguments: tuple[Any, int, str], message: str) -> None:
    with pytest.raises(RecompileError, match=message):
        make_rows(make_source(), TOKENIZER, *arguments)


# ---------------------------------------------------------------- roles

ROLE_PAIRS = [(one, other) for one in ROLE_SHARES for other in ROLE_SHARES if one < other]


@settings(deadline=None, max_examples=15)
@given(length=st.integers(33, 80), other_length=st.integers(33, 80), words=st.integers(20, 200))
def test_roles_never_overlap(length: int, other_length: int, words: int) -> None:
    source = make_source(80, words)
    first = {role: make_rows(source, TOKENIZER, None, length, role) for role in ROLE_SHARES}
    second = {role: make_rows(source, TOKENIZER, None, other_length, role) for role in ROLE_SHARES}
    for one, other in ROLE_PAIRS:
        assert overlap(first[one], second[other]) == 0
        names = [{name for row in rows.documents for name in row.split("+")} for rows in (first[one], second[other])]
        assert not names[0] & names[1]


def test_overlap_counts_shared_windows() -> None:
    document = make_document(0, 100)
    rows, same = (make_rows(TextSource("made", (document,)), TOKENIZER, 1, length, "all") for length in (100, 40))
    assert overlap(rows, same) == 40 - 32 + 1
    assert overlap(rows, make_rows(make_source(), TOKENIZER, 1, 40, "all")) == 40 - 32 + 1  # document 0 is its first
    assert overlap(rows, make_rows(TextSource("x", (make_document(1, 99),)), TOKENIZER, 1, 40, "all")) == 0


def test_documents_that_share_a_passage_get_one_role() -> None:
    passage = make_document(0, 40).text
    documents = [Document(f"{make_document(seed, 30).text} {passage}", "a") for seed in range(1, 9)]
    strangers = [make_document(seed, 70) for seed in range(100, 140)]
    roles = assign_roles(TextSource("made", (*documents, *strangers)))
    assert len(set(roles[:8])) == 1
    assert set(roles[8:]) == set(ROLE_SHARES)


def test_what_very_many_documents_repeat_does_not_tie_them_together() -> None:
    notice = make_document(0, 40).text
    documents = [Document(f"{notice}\n{make_document(seed, 30).text}", "a") for seed in range(1, 101)]
    assert set(assign_roles(TextSource("made", tuple(documents)))) == set(ROLE_SHARES)


def test_a_role_depends_on_words_not_on_blanks_order_or_company() -> None:
    source = make_source()
    roles = dict(zip(source.documents, assign_roles(source), strict=True))
    turned = tuple(reversed(source.documents[:30]))
    assert assign_roles(TextSource("x", turned)) == tuple(roles[document] for document in turned)
    spaced = tuple(Document(document.text.replace(" ", "\n  "), "c") for document in source.documents)
    assert assign_roles(TextSource("x", spaced)) == tuple(roles.values())


def test_roles_are_frozen() -> None:
    """A change here moves documents between roles, and makes old measurements use rows they were chosen on."""
    roles = assign_roles(TextSource("made", tuple(Document(f"document {n}", "a") for n in range(12))))
    assert roles == (
        "accept",
        "accept",
        "accept",
        "report",
        "calibrate",
        "calibrate",
        "choose",
        "report",
        "calibrate",
        "report",
        "choose",
        "calibrate",
    )


def test_an_exact_copy_is_used_once() -> None:
    document = make_document(0, 64)
    source = TextSource("made", (document, Document(document.text + "\n", "a")))
    (role,) = set(assign_roles(source))
    assert len(make_rows(source, TOKENIZER, None, 64, role).ids) == 1
    assert len(make_rows(source, TOKENIZER, None, 64, "all").ids) == 2


# ---------------------------------------------------------------- texts


def test_the_default_text_serves_every_role(base_model: Path) -> None:
    source = default_text()
    if not source.name.startswith("exllamav2"):
        pytest.skip("the wheel exllamav2 is not installed")
    assert "exllamav2" not in sys.modules
    tokenizer = load_tokenizer(base_model)
    rows = {role: make_rows(source, tokenizer, None, 512, role) for role in ROLE_SHARES}
    for one, other in ROLE_PAIRS:
        assert overlap(rows[one], rows[other]) == 0
    report = make_rows(source, tokenizer, 45, 512, "report")
    assert {origin: report.origins.count(origin) for origin in report.origins} == dict.fromkeys(
        ("wiki", "c4", "technical", "code", "tiny"), 9
    )
    assert len(rows["calibrate"].ids) >= 256
    assert min(len(rows[role].ids) for role in ROLE_SHARES) >= 128


def test_python_s_own_topics_serve_where_no_wheel_is_installed(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_find_exllamav2_text", lambda: None)
    source = default_text()
    assert source.name.startswith("pydoc_data.topics of Python 3.")
    tokenizer = load_tokenizer(base_model)
    rows = {role: make_rows(source, tokenizer, 8, 512, role) for role in ROLE_SHARES}
    for one, other in ROLE_PAIRS:
        assert overlap(rows[one], rows[other]) == 0


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab. \n"), max_size=400), st.integers(4, 60))
def test_stretches_joined_are_the_text(text: str, stretch_chars: int) -> None:
    stretches = cut_stretches(text, "a", stretch_chars)
    assert "".join(stretch.text for stretch in stretches).strip() == text.strip()
    assert all(len(stretch.text) <= stretch_chars + stretch_chars // 2 for stretch in stretches)
    assert [stretch.continues for stretch in stretches[:1]] in ([], [False])


def test_a_running_text_is_whole_under_the_role_all_and_split_under_others(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "\n".join(make_document(seed, 100).text for seed in range(100))
    path.write_text(text)
    source = text_from_file(path)
    assert len(source.documents) > 5
    rows = make_rows(source, TOKENIZER, None, 128, "all")
    assert rows.ids.flatten().tolist() == TOKENIZER(text)["input_ids"][: rows.ids.numel()]
    assert rows.ids.numel() == 10_000 // 128 * 128
    assert len(set(assign_roles(source))) > 1


@pytest.mark.parametrize(
    "text",
    [
        '<doc id="1">\none\n\n\nstill one\n</doc>\n<doc id="2">two</doc>\n',
        "one\n\n\nstill one\ftwo\f",
        "\ufeffone\n\nstill one\n\n\n\ntwo\n",
        "one\r\n\r\nstill one\r\n\r\n\r\ntwo\r\n",
    ],
)
def test_documents_of_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    bodies = [" ".join(document.text.split()) for document in text_from_file(path).documents]
    assert bodies == ["one still one", "two"]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text(" \n\f\n")
    with pytest.raises(RecompileError, match=r"latin\.txt: not UTF-8 text: .* at byte 3"):
        text_from_file(tmp_path / "latin.txt")
    with pytest.raises(RecompileError, match=r"empty\.txt: there is no text"):
        text_from_file(tmp_path / "empty.txt")
    with pytest.raises(RecompileError, match=r"none\.txt: cannot be read: No such file"):
        text_from_file(tmp_path / "none.txt")


class FakeData(list[dict[str, Any]]):
    column_names = ("id", "text")

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_text_from_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, split: str | None) -> Any:
        asked.append((path, config, split))
        data = FakeData([{"id": 1, "text": " = A = \n"}, {"id": 2, "text": "more of it"}])
        if path == "org/none":
            raise ConnectionError("offline\nand more")
        return data if split else {"train": data}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert text_from_dataset("wiki2").documents == (Document(" = A = \n\n\nmore of it", "Salesforce/wikitext"),)
    source = text_from_dataset("org/web")
    assert (source.name, len(source.documents)) == ("org/web:train", 2)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ("org/web", None, None)]
    with pytest.raises(RecompileError, match=r"dataset org/none: cannot be loaded: ConnectionError: offline$"):
        text_from_dataset("org/none")


def test_no_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecompileError, match="pip install datasets, or use text FILE"):
        text_from_dataset("wiki2")


# ---------------------------------------------------------------- rows in files


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = make_rows(make_source(), TOKENIZER, 5, 16, "report")
    save_rows(rows, tmp_path / "rows.safetensors")
    back = rows_from_file(tmp_path / "rows.safetensors")
    assert torch.equal(back.ids, rows.ids)
    for field in ("documents", "origins", "source", "role", "sha256"):
        assert getattr(back, field) == getattr(rows, field)


def test_rows_of_another_tool(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    read: list[Rows] = []
    for name, dtype in (("a", torch.int64), ("b", torch.int32)):
        save_file({"input_ids": ids.to(dtype), "mask": torch.ones_like(ids)}, tmp_path / name)
        read.append(rows_from_file(tmp_path / name))
    assert read[0].ids.dtype == read[1].ids.dtype == torch.int64
    assert torch.equal(read[1].ids, ids)
    assert read[0].sha256 == read[1].sha256
    assert read[0].role == "all"
    assert read[0].documents == read[1].documents, "a row is told again by what is in it"
    assert len(set(read[0].documents)) == 2


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"ids": torch.ones(2, 3, dtype=torch.int64)}, 'no key "input_ids"; its keys are ids'),
        ({"input_ids": torch.ones(2, 3)}, "has dtype float32; int64 is wanted"),
        ({"input_ids": torch.ones(6, dtype=torch.int64)}, r"has shape \[6\]; \[rows, tokens\] is wanted"),
        ({"input_ids": torch.ones(0, 3, dtype=torch.int64)}, r"has shape \[0, 3\]; at least 1 row"),
        ({"input_ids": torch.tensor([[1, 2], [3, -4]])}, r"input_ids\[1, 1\] is -4; a token is 0 or more"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, stored: dict[str, torch.Tensor], message: str) -> None:
    save_file(stored, tmp_path / "rows.safetensors")
    with pytest.raises(RecompileError, match=rf"rows\.safetensors: .*{message}"):
        rows_from_file(tmp_path / "rows.safetensors")


def test_a_file_that_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"not safetensors")
    for name, message in (
        ("rows", "not a whole safetensors file: it has 15 bytes"),
        ("none", "cannot be read: No such file"),
    ):
        with pytest.raises(RecompileError, match=f"{name}: {message}"):
            rows_from_file(tmp_path / name)
    with pytest.raises(OutputError, match="rows/below: cannot be written"):
        save_rows(make_rows(make_source(), TOKENIZER, 1, 16, "all"), tmp_path / "rows" / "below")


# ---------------------------------------------------------------- tokenizers


def test_a_tokenizer_of_another_model_is_refused() -> None:
    check_tokenizer(TOKENIZER, WORDS + 2)
    check_tokenizer(TOKENIZER, WORDS + 100)
    with pytest.raises(MismatchError, match=r'wrong tokenizer: its token 4001 \("w3999"\) is beyond .* of 4001'):
        check_tokenizer(TOKENIZER, WORDS + 1)
    extended = make_tokenizer()
    extended.add_tokens(["<image>"], special_tokens=True)
    check_tokenizer(extended, WORDS + 2)  # a text-only model has no embedding for it, and text never gives it
    rows = make_rows(TextSource("made", (Document("w1 w2 w3", "a"),)), TOKENIZER, 1, 3, "all")
    check_ids(rows, 6)
    with pytest.raises(MismatchError, match="made: token 5 at row 0, position 2 is beyond the model's vocabulary of 5"):
        check_ids(rows, 5)


def test_a_tokenizer_is_loaded_or_missed_by_name(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model")("w1 w2")["input_ids"] == [3, 4]
    with pytest.raises(CheckpointError, match="none: no such directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match=r"bare: no tokenizer here \(none of tokenizer\.json"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="bare: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "bare")


def test_the_hash_of_a_tokenizer_is_of_what_its_ids_mean(tmp_path: Path) -> None:
    def stored(name: str, content: Any, indent: int | None = None) -> str | None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content, indent=indent))
        return tokenizer_sha256(tmp_path / name)

    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    added = [{"id": 3, "content": "<eos>", "special": True}]
    one = stored("one", {"version": "1.0", "added_tokens": added, "model": model})
    padded = {"model": {**model, "merges": [["a", "b"]]}, "padding": {"length": 5}, "added_tokens": added}
    assert stored("two", padded, indent=2) == one
    assert stored("three", {"added_tokens": added, "model": {**model, "vocab": {"a": 1, "b": 0, "ab": 2}}}) != one
    assert stored("four", {"added_tokens": [], "model": model}) != one
    assert stored("five", {"added_tokens": added, "model": {**model, "merges": []}}) != one

    files = tmp_path / "files"
    files.mkdir()
    assert tokenizer_sha256(files) is None
    (files / "vocab.json").write_text('{"b": 1, "a": 0, "ab": 2}')
    (files / "merges.txt").write_text("#version: 0.2\na b\n")
    (files / "added_tokens.json").write_text('{"<eos>": 3}')
    assert tokenizer_sha256(files) == one

    (tmp_path / "one" / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(CheckpointError, match="one: the tokenizer's files cannot be read"):
        tokenizer_sha256(tmp_path / "one")
