"""A GGUF file's tokenizer: loaded without transformers' own look at the file, and written where directories are."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.model.tokenizer import load_tokenizer
from recompile.quantize.gguf import plan_variants
from recompile.quantize.gguf_build import build_variants
from tests.quantize.test_gguf_variants import write_hf

pytest.importorskip("libgguf")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "\u2581", *"abcdefgh", "ab", "abc", "\u2581ab", "  "]
TEXTS = ("ab abc a", "  abcé\u65e5 \U00013000\n\x07", "", "<bos>ab<eos> h")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with a sentencepiece vocabulary without merges, as its files are."""
    folder = tmp_path_factory.mktemp("gemma")
    keys = [
        encode_key("tokenizer.ggml.model", "llama"),
        encode_key("tokenizer.ggml.tokens", TOKENS),
        encode_key("tokenizer.ggml.scores", [-float(n) for n in range(len(TOKENS))]),
        encode_key("tokenizer.ggml.token_type", [3, 3, 3, 2, 4, *[6] * 256, *[1] * (len(TOKENS) - 261)]),
        encode_key("tokenizer.ggml.bos_token_id", 2),
        encode_key("tokenizer.ggml.eos_token_id", 1),
        encode_key("tokenizer.ggml.unknown_token_id", 3),
        encode_key("tokenizer.ggml.padding_token_id", 0),
    ]
    write_gguf(folder / "keys.gguf", keys, [])
    base = write_hf(folder / "hf", "gemma3_text", vocab=len(TOKENS))
    plan = plan_variants(
        open_checkpoint(base), folder / "made", ["Q8_0"], tokenizer_from=open_gguf(folder / "keys.gguf")
    )
    list(build_variants(plan))
    return folder / "made" / "hf-Q8_0.gguf"


def test_its_type_makes_the_tokenizer_that_the_whole_file_does(gemma: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gemma.parent, gguf_file=gemma.name)
    ours = load_tokenizer(gemma)
    assert type(ours) is type(theirs)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours("ab").input_ids == [2, TOKENS.index("ab")]
    assert ours("\x07").input_ids == [2, TOKENS.index("<0x07>")], "bytes that no token spells"


def test_transformers_does_not_take_the_vocabulary_apart(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: object, **kwargs: object) -> None:
        raise AssertionError("51 seconds of a core for a vocabulary of 262,144")

    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", slow)
    assert load_tokenizer(gemma)("ab").input_ids == [2, TOKENS.index("ab")]


@pytest.mark.parametrize("made", ["dense copy", "variant"])
def test_directories_made_from_a_file_have_its_tokenizer(gemma: Path, made: str, tmp_path: Path) -> None:
    if made == "dense copy":
        result = CliRunner().invoke(recompile, ["-i", str(gemma), "-o", str(tmp_path / "out"), "--dense"])
        out = tmp_path / "out"
    else:
        rest = ["-b", "4", "--method", "rtn", "-g", "32", "-r", "1", "-l", "16"]
        result = CliRunner().invoke(model_quantize, ["-i", str(gemma), "-o", str(tmp_path), *rest])
        out = tmp_path / "4bpw"
    assert result.exit_code == 0, result.output
    written, stored = load_tokenizer(out), load_tokenizer(gemma)
    assert [written(text).input_ids for text in TEXTS] == [stored(text).input_ids for text in TEXTS]
    assert "gguf" not in (out / "tokenizer_config.json").read_text()


def test_a_file_whose_keys_make_no_tokenizer_is_decoded_and_said(gemma: Path, tmp_path: Path) -> None:
    data = gemma.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    (tmp_path / "bare.gguf").write_bytes(data)
    result = CliRunner().invoke(recompile, ["-i", str(tmp_path / "bare.gguf"), "-o", str(tmp_path / "out"), "--dense"])
    assert result.exit_code == 0, result.output
    assert "what is written has no tokenizer" in " ".join(result.output.split())
    assert not (tmp_path / "out" / "tokenizer.json").exists()
