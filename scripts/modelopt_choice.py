"""NVIDIA modelopt's own `auto_quantize` on a ladder of plain integer formats, for scripts/bench_optimize.py.

Runs in an environment of its own, which has modelopt and nothing of ours:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 nvidia-modelopt requests transformers safetensors
    ENV/bin/python scripts/modelopt_choice.py REQUEST.json ANSWER.json

The request: {base, ids, group_size, bits: {label: {module: stored bits}}, fused, state, budget_bits}. Formats are
symmetric integers of int(label) bits in groups, calibrated by "max", weights alone; each counts with the stored bits
per weight of its variant. ids: rows of tokens, for the gradient scores. fused: keep modelopt's groups (q, k, v; gate,
up). state: file that keeps the scores. The answer: {choice: {module: label}, effective_bits, seconds}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TRIES = 30  # constraints, each a little tighter, until the size is within the budget


def main(request_path: str, answer_path: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    request = json.loads(Path(request_path).read_text())
    bits: dict[str, dict[str, int]] = request["bits"]
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32)
    weights = {name: value.numel() for name, value in model.named_parameters()}
    modules = list(next(iter(bits.values())))
    count = sum(weights[f"{module}.weight"] for module in modules)
    rates = {label: sum(of.values()) / count for label, of in bits.items()}
    formats = {label: make_format(int(label), request["group_size"], rate) for label, rate in rates.items()}
    if not request["fused"]:
        AutoQuantizeGradientSearcher.quant_grouping_rules = []
    rows = [torch.tensor([row]) for row in request["ids"]]
    _, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": request["budget_bits"] / count,
            "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
        },
        module_search_spaces=[
            {
                "module_name_patterns": ["*.layers.*"],
                "quantization_formats": list(formats.values()),
                "allow_no_quant": False,
            }
        ],
        quantization_formats=list(formats.values()),
        data_loader=rows,
        forward_step=lambda model, row: model(row),
        loss_func=lambda output, row: torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), row[0, 1:]),
        disabled_layers=["*lm_head*"],
        num_calib_steps=1,  # weights alone: their largest value needs no rows
        num_score_steps=len(rows),
        checkpoint=request["state"],
    )
    wanted = request["budget_bits"] / count
    for _ in range(TRIES):
        choice = choice_of(mtq.get_auto_quantize_config(state, {"effective_bits": wanted}), modules)
        over = sum(bits[label][module] for module, label in choice.items()) - request["budget_bits"]
        if over <= 0:
            break
        wanted -= over / count + 1e-5
    else:
        raise SystemExit(f"still {over} bits over the budget at {wanted:.4f} effective bits")
    answer = {"choice": choice, "effective_bits": wanted, "seconds": time.monotonic() - began}
    Path(answer_path).write_text(json.dumps(answer))


def make_format(bits: int, group_size: int, stored_bits: float) -> dict[str, Any]:
    """Weights alone, in groups along the input."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": bits, "block_sizes": {-1: group_size}, "effective_bits": stored_bits},
                "enable": True,
            },
        ],
        "algorithm": "max",
        "effective_bits": stored_bits,
    }


def choice_of(config: dict[str, Any], modules: list[str]) -> dict[str, str]:
    """module -> bits, from the entries of a config for one weight quantizer each."""
    found = {}
    for entry in config["quant_cfg"]:
        module = entry["quantizer_name"].removesuffix(".weight_quantizer")
        if module in modules and module != entry["quantizer_name"] and entry.get("cfg"):
            found[module] = str(entry["cfg"]["num_bits"])
    missing = [module for module in modules if module not in found]
    if missing:
        raise SystemExit(f"modelopt gave no format to {len(missing)} modules, first {missing[0]}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
