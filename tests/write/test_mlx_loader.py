"""`recompile --check DIR --engine mlx`: misread checkpoints are named module by module, and mlx-lm itself agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.merge.check import check_engine
from tests import mlx_engine, tiny
from tests.commands import refusal, run

Tensors = dict[str, Tensor]
Config = dict[str, Any]
DOWN, HEAD, STACK = "model.layers.1.mlp.down_proj", "lm_head", "model.layers.1.mlp.switch_mlp.up_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    how = ("--format", "mlx", "-g", 32, "--no-importance", "--method", "rtn", "-r", 2, "-l", 16, "--quiet")
    run(model_quantize, "-i", tiny.base("llama-2"), "-o", folder / "llama", "-b", 4, "--scheme", "mxfp4", *how)
    run(model_quantize, "-i", tiny.base("qwen3-moe"), "-o", folder / "moe", "-b", 4, *how)
    return {
        "affine": folder / "llama" / "4bpw", "mxfp4": folder / "llama" / "mxfp4", "moe": folder / "moe" / "4bpw"
    }  # fmt: skip


def entry(path: str, value: Any) -> Callable[[Config, Tensors], None]:
    def change(config: Config, tensors: Tensors) -> None:
        config["quantization"][path] = value

    return change


def setting(key: str, value: Any) -> Callable[[Config, Tensors], None]:
    def change(config: Config, tensors: Tensors) -> None:
        config[key] = value
        if value is None:
            del config[key]

    return change


def dropped(name: str) -> Callable[[Config, Tensors], None]:
    def change(config: Config, tensors: Tensors) -> None:
        del tensors[name]

    return change


def nothing(config: Config, tensors: Tensors) -> None:
    pass


def rotary(config: Config, tensors: Tensors) -> None:
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}


def top(config: Config, tensors: Tensors) -> None:
    config["quantization"]["bits"] = 8
    config["quantization"][DOWN] = True


def biases_of_a_float_mode(config: Config, tensors: Tensors) -> None:
    tensors[f"{DOWN}.biases"] = torch.zeros(tensors[f"{DOWN}.scales"].shape, dtype=torch.bfloat16)


def experts_one_by_one(config: Config, tensors: Tensors) -> None:
    for name in [name for name in tensors if ".switch_mlp." in name]:
        for number, value in enumerate(tensors.pop(name)):
            tensors[name.replace(".switch_mlp.", f".experts.{number}.")] = value.contiguous()


def no_top(config: Config, tensors: Tensors) -> None:
    del config["quantization"]["bits"]


# source, change, module that is named, what is said of it (None: it is loaded as it is stored)
CASES: dict[str, tuple[str, Callable[[Config, Tensors], None], str, str | None]] = {
    "as made": ("affine", nothing, "", None),
    "as made, mxfp4": ("mxfp4", nothing, "", None),
    "as made, experts": ("moe", nothing, "", None),
    "an entry that says what the shapes say": ("affine", entry(DOWN, {"bits": 4, "group_size": 32}), "", None),
    "true, where the top says it": ("affine", entry(DOWN, True), "", None),
    "false": ("affine", entry(DOWN, False), DOWN,
              "stored as affine of 4 bits in groups of 32; mlx-lm 0.32.2 applies dense, by quantization:"),
    "an empty map": ("affine", entry(DOWN, {}), DOWN, "applies dense"),
    "other bits": ("affine", entry(DOWN, {"bits": 8, "group_size": 32}), DOWN,
                   "mlx-lm 0.32.2 applies affine of 8 bits in groups of 32"),
    "bits of the mode's default": ("affine", entry(DOWN, {"mode": "affine"}), DOWN,
                                   "applies affine of 4 bits in groups of 64"),
    "another mode": ("affine", entry(DOWN, {"mode": "mxfp4"}), DOWN, "applies mxfp4 of 4 bits in groups of 32"),
    "a mode without biases as affine": ("mxfp4", entry(DOWN, {"bits": 4, "group_size": 32}), DOWN,
                                        "stored as mxfp4 of 4 bits in groups of 32; mlx-lm 0.32.2 applies affine"),
    "true, where the top says more bits": ("affine", top, DOWN, "(true: the values at the top)"),
    "bits without kernels": ("affine", entry(DOWN, {"bits": 7, "group_size": 32}), DOWN, "bits: found 7"),
    "a mode that is none": ("affine", entry(DOWN, {"mode": "int4"}), DOWN, "mode: found 'int4'"),
    "a stack's own defaults": ("moe", entry(STACK, {"mode": "mxfp4"}), STACK, "group_size: found 64, wanted 32"),
    "a stack of fewer bits": ("moe", entry(STACK, {"bits": 3, "group_size": 32}), STACK, "applies affine of 3 bits"),
    "no biases": ("affine", dropped(f"{DOWN}.biases"), DOWN, "wants biases and scales"),
    "biases of a float mode": ("mxfp4", biases_of_a_float_mode, DOWN, "wants scales"),
    "no scales": ("affine", dropped(f"{DOWN}.scales"), DOWN, "stored as U32 codes without scales"),
    "no top": ("affine", no_top, "config.json", "bits is not at the top"),
    "no quantization": ("affine", setting("quantization", None), "config.json", "has no quant_method"),
    "a tied embedding": ("affine", setting("tie_word_embeddings", True), HEAD, "applies the embedding"),
    "a tie that is not said": ("affine", setting("tie_word_embeddings", None), HEAD, "takes to be true"),
    "a rotary base of transformers 5": ("affine", rotary, "config.json", "rope_parameters says rope_theta 100.0"),
    "experts one by one": ("moe", experts_one_by_one, STACK, "is of one expert"),
}  # fmt: skip


def changed(case: str, sources: dict[str, Path], folder: Path) -> Path:
    source, change, _, _ = CASES[case]
    path = tiny.copy_of(sources[source], folder / case.replace(" ", "-").replace(",", ""))
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    change(config, tensors)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "mlx"})
    return path


@pytest.mark.parametrize("case", CASES)
def test_what_is_misread_is_named_and_nothing_else(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    _, _, module, message = CASES[case]
    found = check_engine(changed(case, sources, tmp_path), "mlx")
    if message is None:
        assert found == []
        return
    assert any(problem.where == module and message in problem.message for problem in found), found
    assert all(problem.severity == "error" for problem in found)


def test_files_that_the_index_does_not_list_are_loaded(sources: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.copy_of(sources["affine"], tmp_path / "stray")
    save_file({"model.norm.weight": torch.ones(64)}, path / "model-old.safetensors", {"format": "mlx"})
    (found,) = check_engine(path, "mlx")
    assert "loads every model*.safetensors, and model.norm.weight is in another as well" in found.message


def test_the_command_and_merges(sources: dict[str, Path], tmp_path: Path) -> None:
    assert "no inconsistency found" in run(recompile, "--check", sources["affine"], "--engine", "mlx")
    path = changed("other bits", sources, tmp_path)
    said = refusal(recompile, "--check", path, "--engine", "mlx")
    assert f"{DOWN}: stored as affine of 4 bits in groups of 32" in " ".join(said.split())
    run(recompile, "-i", sources["affine"], "-o", tmp_path / "copy", "--engine", "mlx", "--quiet")
    other = tiny.variants("llama-2", (4,))[4]
    said = refusal(recompile, "-i", other, "-o", tmp_path / "out", "--engine", "mlx")
    assert "is stored as pack-quantized, which mlx-lm does not load" in said


def test_models_that_are_not_known_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.copy_of(sources["affine"], tmp_path / "other")
    config = json.loads((path / "config.json").read_text()) | {"model_type": "olmo"}
    (path / "config.json").write_text(json.dumps(config))
    (found,) = check_engine(path, "mlx")
    assert "model_type 'olmo': what mlx-lm makes of its tensors is not known here" in found.message


_LOAD = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
job = json.loads(Path(sys.argv[1]).read_text())
ids = mx.array(job["ids"])
made = {}
for name, path in job["models"].items():
    try:
        model, _ = load_model(Path(path))
        model.set_dtype(mx.float32)
        made[name] = model(ids).astype(mx.float32).flatten().tolist()
    except Exception as error:
        made[name] = f"{type(error).__name__}: {error}"[:300]
Path(job["out"]).write_text(json.dumps(made))
"""


def test_mlx_lm_stops_at_the_same_checkpoints_or_computes_other_logits(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    mlx_engine.python()
    models = {case: str(changed(case, sources, tmp_path)) for case in CASES}
    models |= {f"source {name}": str(path) for name, path in sources.items()}
    said = tiny.copy_of(sources["affine"], tmp_path / "said")
    config = json.loads((said / "config.json").read_text()) | {"rope_theta": 100.0}
    (said / "config.json").write_text(json.dumps(config))
    models["meant by a rotary base of transformers 5"] = str(said)
    job: dict[str, object] = {"ids": tiny.rows(1, 12).tolist(), "models": models, "out": str(tmp_path / "made.json")}
    ended = mlx_engine.run(_LOAD, job, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    made = json.loads((tmp_path / "made.json").read_text())
    for case, (source, _, _, message) in CASES.items():
        same = made[case] == made.get(f"meant by {case}", made[f"source {source}"])
        assert same == (message is None), (case, made[case] if isinstance(made[case], str) else "other logits")
