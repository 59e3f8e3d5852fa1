"""GGUF files of the trained tiny model for the real engines: tokenizer keys, importance, files of any types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eval.engines.builds import EngineError, Installed, find_engine
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.model.texts import default_text
from recompile.model.tokenizer import load_tokenizer
from recompile.model.tokens import make_rows
from recompile.quantize.gguf import Importance, Mix, base_tensors, collect_importance, plan_variants
from recompile.quantize.gguf_build import build_variants

PADDING, NORMAL, CONTROL = 5, 1, 3  # token types of GGUF


def installed(engine: str) -> Installed:
    """An engine of scripts/setup; skips the test, saying why, where it is not there."""
    try:
        return find_engine(engine)
    except EngineError as error:
        pytest.skip(str(error))


def sharpened(model: Path, folder: Path, factor: float = 4.0) -> Path:
    """The trained model with logits so many times as large: what quantization costs is then well above what an engine's
    8-bit activations do."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tokenizer(model: Path, path: Path) -> Path:
    """The keys of a byte-pair tokenizer.json, as llama.cpp reads them."""
    content = json.loads((model / "tokenizer.json").read_text())
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [PADDING] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    records = [
        encode_key("general.architecture", "llama"),
        encode_key("tokenizer.ggml.model", "gpt2"),
        encode_key("tokenizer.ggml.pre", "gpt-2"),
        encode_key("tokenizer.ggml.tokens", tokens),
        encode_key("tokenizer.ggml.token_type", kinds, "i32"),
        encode_key("tokenizer.ggml.merges", merges),
        encode_key("tokenizer.ggml.bos_token_id", 0, "u32"),
        encode_key("tokenizer.ggml.eos_token_id", 0, "u32"),
        encode_key("tokenizer.ggml.add_bos_token", False),
    ]
    write_gguf(path, records, [])
    return path


def calibrated(model: Path) -> Importance:
    passing = collect_importance(
        open_checkpoint(model), make_rows(default_text(), load_tokenizer(model), 4, 128, "calibrate").ids
    )
    *_, found = passing
    assert isinstance(found, Importance)
    return found


def mix_of(model: Path, name: str, kinds: Sequence[str], others: str | None = None) -> Mix:
    """Matrices of the layers get the types in turn, the embedding and the head Q6_K; with `others`, the smallest of
    them get the types and the rest that one."""
    base = open_checkpoint(model)
    weighty = [t for t in base_tensors(base) if not t.plain]
    inner = [tensor.name for tensor in weighty if tensor.name.startswith("blk.")]
    assert len(inner) >= len(kinds), "every type is to be in the file"
    if others is not None:
        inner.sort(key=lambda name: (".attn_k." not in name and ".attn_v." not in name, name))
        kinds = [*kinds, *[others] * (len(inner) - len(kinds))]
    types = {name: kinds[number % len(kinds)] for number, name in enumerate(inner)}
    return Mix(name, {tensor.name: types.get(tensor.name, "Q6_K") for tensor in weighty})


def write_files(model: Path, folder: Path, names: Sequence[str | Mix], importance: Importance | None) -> list[Path]:
    keys = write_tokenizer(model, folder / "tokens.gguf")
    plan = plan_variants(open_checkpoint(model), folder, names, tokenizer_from=open_gguf(keys), importance=importance)
    for _ in build_variants(plan):
        pass
    return [variant.path for variant in plan.variants]
