"""`recompile --check`: a table of checkpoints that are not what they say, each by the sentence that tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_quantize
from recompile.cli import recompile as command
from recompile.errors import FormatError
from recompile.merge.check_model import vocabulary_problems
from recompile.merge.run import run_check
from recompile.model.decoded import as_dense
from tests import tiny
from tests.commands import refusal, run
from tests.stream import architectures

MODULE = "model.layers.1.mlp.up_proj"
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def drop(*parts: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(f"{MODULE}.{part}") for part in parts] and None


def nan_in(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = float("nan")

    return change


def rows(count: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, table])[:count].clone()

    return change


def narrow(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()


def method(name: str) -> Callable[[Config], None]:
    return lambda config: config["quantization_config"].update(quant_method=name)


def same(_: Any) -> None:
    pass


# config.json, tensors -> what is said
CASES: dict[str, tuple[Callable[[Config], Any], Callable[[Tensors], Any], str]] = {
    "another method, awq": (
        method("awq"),
        same,
        "quant_method is 'awq', and model.layers.0.* is stored as pack-quantized",
    ),
    "another method, gptq": (method("gptq"), same, "quant_method is 'gptq'.*which goes with compressed-tensors"),
    "another method, fp8": (method("fp8"), same, "quant_method is 'fp8'.*which goes with compressed-tensors"),
    "no scale": (same, drop("weight_scale"), rf"{MODULE} has weight_packed I32 .*wanted pack-quantized"),
    "no codes": (same, drop("weight_packed"), rf"{MODULE} has weight_scale, weight_shape and no weight"),
    "no shape": (same, drop("weight_shape"), rf"{MODULE} is pack-quantized without weight_shape"),
    "no module": (same, drop("weight_packed", "weight_scale", "weight_shape"), rf"holds nothing for 1 .*{MODULE}"),
    "NaN scale": (same, nan_in(f"{MODULE}.weight_scale"), rf"{MODULE}.weight_scale: holds 1 NaN"),
    "NaN norm": (same, nan_in("model.norm.weight"), r"model.norm.weight: holds 1 NaN"),
    "more rows": (same, rows(320), r"model.embed_tokens: has 320 rows, and vocab_size in config.json is 256"),
    "fewer rows": (same, rows(200), r"model.embed_tokens: has 200 rows, and vocab_size in config.json is 256"),
    "tokenizer": (same, rows(200), r"tokenizer.json: has a token 255, and model.embed_tokens has rows 0 to 199"),
    "more layers": (lambda config: config.update(num_hidden_layers=6), same, "holds nothing for .*model.layers.4"),
    "another width": (lambda config: config.update(intermediate_size=256), same, r"wants \[256, 64\]"),
    "narrow norm": (same, narrow, r"model.norm.weight: is \[32\], the model of config.json wants \[64\]"),
}


def damaged(directory: Path, change: Callable[[Config], Any], tensors: Callable[[Tensors], Any]) -> Path:
    tiny.copy_of(tiny.variants("llama", (4,))[4], directory)
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    values = load_file(directory / "model.safetensors")
    tensors(values)
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(("change", "tensors", "said"), CASES.values(), ids=CASES)
def test_check_finds(
    change: Callable[[Config], Any], tensors: Callable[[Tensors], Any], said: str, tmp_path: Path
) -> None:
    import re

    report = run_check(str(damaged(tmp_path / "model", change, tensors)), False, None)
    assert any(re.search(said, str(problem), re.DOTALL) for problem in report.errors), report.errors


def test_a_whole_one_passes_and_says_what_was_looked_at(tmp_path: Path) -> None:
    for path in (tiny.variants("llama", (4,))[4], tiny.base("llama"), tiny.base("qwen3-moe"), tiny.base("gemma2")):
        said = run(command.main, "--check", path)
        assert f"{path}: no inconsistency found" in said
        assert "modules and shapes were compared with config.json" in said
        assert "values were read of " in said
        for engine in ("transformers", "vllm", "sglang"):
            assert f"{engine}: nothing in it keeps it from loading" in said
    said = refusal(command.main, "--check", damaged(tmp_path / "bad", *CASES["more rows"][:2]))
    assert "check found 1 error" in said or "errors" in said


def test_a_quantized_conv1d_is_out_times_in(tmp_path: Path) -> None:
    """GPT-2 stores dense weights [in, out], quantized ones [out, in]; another shape is still told."""
    out = tmp_path / "made"
    save_file({"input_ids": architectures.rows(2, 12)}, tmp_path / "ids.safetensors")
    run(
        model_quantize.main, "-i", architectures.checkpoint("gpt2"), "-o", out, "-b", 4, "-g", 16,
        "--input-ids", tmp_path / "ids.safetensors",
    )  # fmt: skip
    made = out / "4bpw"
    (made / "tokenizer.json").unlink()  # of more tokens than the model has rows
    said = run(command.main, "--check", made)
    assert "error" not in said
    assert "transformers: does not load it: transformer.h.0.attn.c_attn: transformers 5" in said
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "n_inner": 64}))
    assert "c_fc.weight: is [128, 32], the model of config.json wants [64, 32]" in refusal(
        command.main, "--check", made
    )


def test_a_decoded_copy_of_a_conv1d_is_in_times_out_again(tmp_path: Path) -> None:
    """And so is a quantized GPT-2 as a base of another build."""
    ids = architectures.rows(2, 12)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    run(
        model_quantize.main, "-i", architectures.checkpoint("gpt2"), "-o", tmp_path, "-b", 8, "-g", 16,
        "--input-ids", tmp_path / "ids.safetensors",
    )  # fmt: skip
    run(command.main, "-i", tmp_path / "8bpw", "-o", tmp_path / "dense", "--dense")
    made, base = open_checkpoint(tmp_path / "8bpw"), open_checkpoint(architectures.checkpoint("gpt2"))
    copy = open_checkpoint(tmp_path / "dense")
    assert {name: info.shape for name, info in copy.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    wanted = tiny.streamed_logits(made, ids)
    plain = tiny.plain_logits(architectures.plain_model(tmp_path / "dense"), ids, 2)
    assert float((plain - wanted).abs().max()) < 0.02 * float(wanted.std())  # bfloat16
    assert torch.allclose(tiny.streamed_logits(as_dense(made), ids), wanted, atol=1e-5)


@pytest.mark.parametrize("case", ["no scale", "no codes", "no shape"])
def test_nothing_of_a_module_with_parts_missing_is_written(case: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "model", *CASES[case][:2])
    with pytest.raises(FormatError, match="the checkpoint is incomplete: download or make it again"):
        _ = open_checkpoint(path).modules
    assert "incomplete" in refusal(command.main, "-i", path, "-o", tmp_path / "out", "--dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model_type", "rows", "told"), [("mllama", 72, 0), ("mllama", 80, 1), ("llama", 72, 1)])
def test_rows_that_the_model_itself_adds_are_no_error(model_type: str, rows: int, told: int) -> None:
    """Llama 3.2 Vision has an embedding of vocab_size + 8 rows, and a head of vocab_size."""
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": None}
    text = {**size, "num_attention_heads": 4, "num_key_value_heads": 2}
    nested = {"text_config": {**text, "model_type": "mllama_text_model", "cross_attention_layers": []}}
    config = {"model_type": model_type, **(nested if model_type == "mllama" else text)}
    module = SimpleNamespace(shape=(rows, 32), format="dense")
    checkpoint: Any = SimpleNamespace(config=config, modules={"model.embed_tokens": module}, path=Path("nowhere"))
    assert len(list(vocabulary_problems(checkpoint))) == told
