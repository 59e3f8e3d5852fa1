"""Everything that takes --device, on a GPU, beside the same on the CPU. Skipped where there is none.

Both sides run in float32, so that what differs is the order of sums. Rounding codes at the edge of two grid points may
fall the other way for it, which moves a checkpoint's KL by parts in a thousand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eval.heal import HealOptions, heal
from eval.heal_rows import HealRows
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_auto import main as model_auto
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.costs import load_profile
from recompile.recipe.recipe import load_recipe
from tests import mixes, tiny
from tests.commands import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda:0"
GROUP = tiny.GROUP_SIZE
TEXT = "\n\n\n".join(f"Document {n}. " + " ".join(f"word{(n * k) % 97}" for k in range(120)) for n in range(60))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": tiny.rows(8, 32)}, path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def kl(model: Path, base: Path, ids: Path, out: Path, device: str = "cpu") -> float:
    run(model_diff, "-ma", model, "-mb", base, "--input-ids", ids, "--json", out, "-d", device, "--dtype", "float32")
    return float(json.loads(out.read_text())["kl"]["mean"])


# ---- what is stored --------------------------------------------------------------------------------------------------

STORED: Mapping[str, Callable[[Path], Path]] = {
    "dense": mixes.dense,
    "int3": lambda path: mixes.packed(path, 3),
    "int4-zeros": lambda path: mixes.packed(path, 4, symmetric=False),
    "exl2": lambda path: mixes.as_exl2(path, 4),
    "exl3": lambda path: mixes.as_exl3(path, 3, "mcg"),
    "exl3-half": lambda path: mixes.as_exl3(path, 2.5, "mul1"),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_format_decodes_to_the_same_values(kind: str, tmp_path: Path) -> None:
    same_values(open_checkpoint(STORED[kind](tmp_path / kind)))


def same_values(checkpoint: Checkpoint, rtol: float = 0.0) -> None:
    for module in checkpoint.modules.values():
        names = [module.dense_name] if module.is_quantized else [info.name for info in module.parts.values()]
        for name in names:
            there = checkpoint.load(name, device=DEVICE)
            assert there.device == torch.device(DEVICE), name
            assert_close(there.cpu(), checkpoint.load(name), rtol, name)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, rtol: float, name: str) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()), msg=lambda m: f"{name}: {m}"
    )


# ---- quantizing ------------------------------------------------------------------------------------------------------

QUANTIZED: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "rtn": ("3bpw", ("-b", 3, "-g", GROUP, "--method", "rtn")),
    "mse-zeros": ("3bpw", ("-b", 3, "-g", GROUP, "--method", "mse", "--asym")),
    "gptq": ("3bpw", ("-b", 3, "-g", GROUP, "--method", "gptq")),
    "two-sided": ("3bpw", ("-b", 3, "-g", GROUP, "--rounding", "two-sided")),
    "nvfp4 two-sided": ("nvfp4", ("--scheme", "nvfp4", "--rounding", "two-sided")),
    "exl2 two-sided": ("3bpw", ("-b", 3, "--format", "exl2", "--rounding", "two-sided")),
    "awq": ("w4a16-g32", ("--scheme", "w4a16-g32", "--method", "awq")),
    "smoothquant": ("w8a8", ("--scheme", "w8a8", "--method", "smoothquant")),
    "fp8": ("fp8-channel", ("--scheme", "fp8-channel")),
    "nvfp4": ("nvfp4", ("--scheme", "nvfp4")),
    "mxfp4": ("mxfp4", ("--scheme", "mxfp4")),
    "exl2": ("3bpw", ("-b", 3, "--format", "exl2")),
    "exl3": ("3bpw", ("-b", 3, "--format", "exl3")),
}


@pytest.mark.parametrize("architecture", ["llama-2", "qwen3-moe"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_variant_made_there_is_as_good(kind: str, architecture: str, ids: Path, tmp_path: Path) -> None:
    if kind == "exl3" and architecture == "qwen3-moe":
        pytest.skip("EXL3 pads to 128, and experts of 64 are no EXL3 model")
    name, options = QUANTIZED[kind]
    base, found = tiny.base(architecture), {}
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        run(model_quantize, "-i", base, "-o", out, *options, "--input-ids", ids, "-d", device, "--dtype", "float32")
        found[device] = kl(out / name, base, ids, tmp_path / "kl.json")
    same_values(open_checkpoint(tmp_path / DEVICE / name), 1e-6)
    assert 0 < found["cpu"] < 5
    assert found[DEVICE] == pytest.approx(found["cpu"], rel=0.1)


def test_a_build_is_healed_there(tmp_path: Path) -> None:
    build, base = open_checkpoint(tiny.variants("qwen3-moe", (3,))[3]), open_checkpoint(tiny.base("qwen3-moe"))
    judges = {name: tiny.rows(6, 24, seed=n) for n, name in enumerate(("choose", "accept", "report", "second"), 20)}
    rows, gains = HealRows(train=tiny.rows(24, 24), **judges), {}
    for device in ("cpu", DEVICE):
        options = HealOptions(
            tokens=576, batch_tokens=96, check_every=3, learning_rate=0.01, device=device, dtype=torch.float32
        )
        *_, report = heal(build, base, tmp_path / device, rows, options)
        gains[device] = report.report.ratio
    assert gains["cpu"] < 1
    assert gains[DEVICE] == pytest.approx(gains["cpu"], rel=0.05)


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "qwen2-moe", "qwen3-moe", "gemma2", "gemma3"])
def test_the_same_kl_is_measured(architecture: str, ids: Path, tmp_path: Path) -> None:
    base, variant = tiny.base(architecture), tiny.variants(architecture, (3,))[3]
    here, there = (kl(variant, base, ids, tmp_path / "kl.json", device) for device in ("cpu", DEVICE))
    assert there == pytest.approx(here, rel=1e-3)


def profile(mode: str, architecture: str, ids: Path, out: Path, device: str) -> Any:
    low, middle, high = tiny.variants(architecture, (2, 4, 8)).values()
    given = ("-mb", tiny.base(architecture), "-i", middle, "-s", low, high, "-o", out, "--input-ids", ids)
    run(model_profile, *given, "--mode", mode, "--level", "tensor", "-d", device, "--dtype", "float32", "--quiet")
    return load_profile(out)


@pytest.mark.parametrize("mode", ["exact", "sketch", "diagonal", "weights"])
@pytest.mark.parametrize("architecture", ["llama-2", "qwen3-moe"])
def test_the_same_costs_are_measured(architecture: str, mode: str, ids: Path, tmp_path: Path) -> None:
    here, there = (profile(mode, architecture, ids, tmp_path / f"{d}.jsonl", d) for d in ("cpu", DEVICE))
    assert set(there.measurements) == set(here.measurements)
    for swap, wanted in here.measurements.items():
        assert there.measurements[swap].mean == pytest.approx(wanted.mean, rel=5e-3, abs=1e-6), swap


def test_candidates_are_made_there(ids: Path, tmp_path: Path) -> None:
    for device in ("cpu", DEVICE):
        given = ("-mb", tiny.base("llama-2"), "--candidates", "2,4", "-g", GROUP, "-o", tmp_path / f"{device}.jsonl")
        run(model_profile, *given, "--input-ids", ids, "-d", device, "--dtype", "float32", "--quiet")
    here, there = (load_profile(tmp_path / f"{device}.jsonl") for device in ("cpu", DEVICE))
    for swap, wanted in here.measurements.items():
        assert there.measurements[swap].mean == pytest.approx(wanted.mean, rel=0.1, abs=1e-6), swap


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["superadditive", "tilted", "local", "refine"])
def test_a_search_runs_there(solver: str, ids: Path, text: Path, tmp_path: Path) -> None:
    profile("sketch", "llama-2", ids, tmp_path / "profile.jsonl", DEVICE)
    out, report = tmp_path / "overrides.yaml", tmp_path / "report.json"
    given = ("-b", 4.6, "-o", out, "--solver", solver, "--steps", 3, "--check", "-r", 4, "-l", 32, "--text", text)
    run(model_optimize, tmp_path / "profile.jsonl", *given, "-d", DEVICE, "--json", report, "--quiet")
    assert load_recipe(out).provenance["bpw"] <= 4.6
    assert json.loads(report.read_text())


@pytest.mark.parametrize(
    "more", [("--candidates", "3,4,6", "-g", GROUP, "-b", 4.3), ("--candidates", "3,4", "--format", "exl2", "-b", 3.7)]
)
def test_one_command_goes_the_whole_way_there(more: tuple[object, ...], text: Path, tmp_path: Path) -> None:
    given = ("-i", tiny.base("llama-2"), "-o", tmp_path / "mix", "-r", 3, "-l", 32, "--samples", 4, *more)
    run(model_auto, *given, "--calibration-rows", 4, "--text", text, "-d", DEVICE, "--quiet", "--minutes", 0.2)
    assert open_checkpoint(tmp_path / "mix").size_bytes > 0
