"""mlx-lm's quantizers on given token rows. settings: method "uniform", "gptq", "dwq", "dynamic" or "dynamic-dwq",
bits, group_size, config (keys to add to the base's); for dynamic: target_bpw, high_bits; for dwq: learning_rate,
batch_size, passes over the rows.

Products with quantized weights are done with the decoded weight, the same sums: MLX's own take a hundred times as long
on a CPU."""

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load, quantize_model, save


def product(self, x):
    """x times the decoded weight, through which gradients reach scales and biases."""
    codes = mx.dequantize(
        self.weight, mx.ones_like(self.scales), mx.zeros_like(self.biases), group_size=self.group_size, bits=self.bits
    )
    weight = codes.reshape(*self.scales.shape, -1) * self.scales[..., None] + self.biases[..., None]
    made = x @ weight.reshape(codes.shape).T
    return made + self["bias"] if "bias" in self else made


nn.QuantizedLinear.__call__ = product
nn.QuantizedEmbedding.as_linear = product

given = json.loads(Path(sys.argv[1]).read_text())
method, bits, group_size = given["method"], given["bits"], given["group_size"]
ids = mx.load(given["rows"])["input_ids"].astype(mx.int32)
mx.random.seed(123)
model, tokenizer, config = load(given["base"], model_config=given["config"], return_config=True)
stored = model.layers[0].self_attn.q_proj.weight.dtype
model.set_dtype(mx.float32)  # MLX multiplies float32 matrices much faster on a CPU
reference = copy.deepcopy(model) if "dwq" in method else None

if method == "gptq":  # what is no Linear (the embedding) gets as many bits as the rest
    model, found = gptq_quantize(model, ids, bits, group_size, bits, group_size)
    config["quantization"] = config["quantization_config"] = found
elif method.startswith("dynamic"):
    low_high = (bits, group_size, given["high_bits"], group_size)
    costs = dict(estimate_sensitivities(model, ids, *low_high))
    wide = 8 * (4 - stored.size) * 2 / group_size  # scales and biases are float32 here, and stored narrower
    threshold = estimate_threshold(model, costs, given["target_bpw"] + wide, *low_high)

    def chosen(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": given["high_bits"], "group_size": group_size} if costs[path] > threshold else True

    model, config = quantize_model(model, config, group_size=group_size, bits=bits, quant_predicate=chosen)
else:
    model, config = quantize_model(model, config, group_size=group_size, bits=bits)

if reference is not None:
    held = max(given["batch_size"], len(ids) // 8)
    rows = [(row, 0) for row in ids.tolist()]
    dwq_quantize(
        model,
        lambda batch, number, split: reference(batch),
        mlx.optimizers.Adam(learning_rate=given["learning_rate"], bias_correction=True),
        rows[held:] * given["passes"],
        rows[:held],
        batch_size=given["batch_size"],
        max_seq_length=ids.shape[1] + 1,
        seed=123,
        dtype=mx.float32,
    )
model.set_dtype(stored)
save(given["out"], given["base"], model, tokenizer, config)
