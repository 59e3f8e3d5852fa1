"""llm-compressor's oneshot on given token rows. settings: method "gptq" or "awq", group_size, symmetric, and groups
[{targets, bits}], the first that names a module decides."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file

given = json.loads(Path(sys.argv[1]).read_text())
ids = load_file(given["rows"])["input_ids"]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * ids.shape[0]})
groups = {
    f"group_{number}": {
        "targets": group["targets"],
        "weights": {
            "num_bits": group["bits"],
            "type": "int",
            "symmetric": given["symmetric"],
            "strategy": "group",
            "group_size": given["group_size"],
        },
    }
    for number, group in enumerate(given["groups"])
}
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda self, *names: (
        None
    )  # AWQ calls it, and torch refuses to pin without an accelerator
modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[given["method"]]
oneshot(
    model=given["base"],
    dataset=data,
    recipe=[modifier(config_groups=groups, ignore=["lm_head"])],
    num_calibration_samples=ids.shape[0],
    max_seq_length=ids.shape[1],
    shuffle_calibration_samples=False,
    output_dir=given["out"],
)
