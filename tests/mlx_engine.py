"""mlx-lm as a judge, in the environment of `recompile engines install mlx`, or a Python of `RECOMPILE_MLX_PYTHON`.

pytest tests/formats/test_mlx.py tests/quantize/test_mlx_encode.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import judges

# argv: a JSON file with what to do. Runs without anything of ours. `logits` with weights as float32, as ours are.
_PROGRAM = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
job = json.loads(Path(sys.argv[1]).read_text())
ids = mx.load(job["ids"])["input_ids"]
made = {}
for number, path in enumerate(job["models"]):
    model, _ = load_model(Path(path))
    model.set_dtype(mx.float32)
    made[f"logits{number}"] = mx.concatenate([model(row[None]).astype(mx.float32) for row in ids])
mx.save_safetensors(job["out"], made)
"""


def python() -> str:
    """The Python to run; skips the test where none has mlx-lm."""
    return str(judges.python("mlx"))


def run(program: str, job: dict[str, object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in that environment with one JSON file as its argument."""
    interpreter = python()
    (folder / "job.json").write_text(json.dumps(job))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [interpreter, "-c", program, str(folder / "job.json")]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300, check=False)


def engine_logits(models: Sequence[Path], ids: Tensor, folder: Path) -> list[Tensor]:
    """mlx-lm's logits [rows, tokens, vocab] float32 of every model on the same rows; folder: for its files."""
    python()
    save_file({"input_ids": ids}, folder / "mlx_ids.safetensors")
    out = folder / "mlx_logits.safetensors"
    job = {"ids": str(folder / "mlx_ids.safetensors"), "models": [str(path) for path in models], "out": str(out)}
    ended = run(_PROGRAM, job, folder)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = load_file(out)
    return [found[f"logits{number}"] for number in range(len(models))]


def assert_same_logits(found: Tensor, wanted: Tensor) -> None:
    """float32 of two engines: within 1e-3 of the logits' range."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.max() - wanted.min())
    assert torch.isfinite(found).all()
