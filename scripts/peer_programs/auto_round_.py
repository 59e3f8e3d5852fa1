"""AutoRound on given token rows. settings: scheme {bits, group_size, sym} or schemes and bits (its AutoScheme), format
of the export, batch_size, options (iters, enable_alg_ext, ...)."""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer

given = json.loads(Path(sys.argv[1]).read_text())
ids = load_file(given["rows"])["input_ids"]
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
made = AutoRound(
    given["base"],
    AutoTokenizer.from_pretrained(given["base"]),
    dataset=torch.utils.data.DataLoader(rows, batch_size=given["batch_size"]),
    nsamples=ids.shape[0],
    seqlen=ids.shape[1],
    batch_size=given["batch_size"],
    device_map="cpu",
    **{name: given[name] for name in ("scheme", "schemes", "bits") if name in given},
    **given.get("options", {}),
)
made.quantize_and_save(given["out"], format=given["format"])
# It makes a folder of its own name inside: the build is that folder, or the GGUF file in it.
inner = next(
    iter([*Path(given["out"]).rglob("*.gguf"), *(found.parent for found in Path(given["out"]).rglob("config.json"))])
)
if inner != Path(given["out"]):
    kept = Path(given["out"] + ".inner")
    inner.rename(kept)
    shutil.rmtree(given["out"])
    kept.rename(given["out"])
