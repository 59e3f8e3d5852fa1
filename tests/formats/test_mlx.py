"""MLX checkpoints: every layout to the bit as mlx decodes it, configs, whole models, merges with exact entries.

tests/vectors/mlx.safetensors was made by `mx.quantize` of mlx 0.32.4 on a CPU: normal weights [3, 256], `dense` is
`mx.dequantize` with scales and biases as float32.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.errors import CheckpointError, FormatError
from recompile.formats.mlx import dequantize, unpack_codes
from recompile.formats.mlx_config import MlxScheme, read_scheme
from recompile.merge.check import check_checkpoint
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from tests import mixes, mlx_engine, tiny
from tests.commands import refusal, run
from tests.formats.test_checkpoints import check_equal, streamed_logits

VECTORS = Path(__file__).parents[1] / "vectors" / "mlx.safetensors"
LAYOUTS = [MlxScheme(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
LAYOUTS += [MlxScheme(4, 32, "mxfp4"), MlxScheme(8, 32, "mxfp8"), MlxScheme(4, 16, "nvfp4")]
AFFINE = MlxScheme(4, 64)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@cache
def vectors() -> dict[str, Tensor]:
    return load_file(VECTORS)


def parts_of(scheme: MlxScheme) -> dict[str, Tensor]:
    prefix = f"{scheme.mode}_{scheme.bits}_g{scheme.group_size}."
    return {name.removeprefix(prefix): value for name, value in vectors().items() if name.startswith(prefix)}


# ---- one module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", LAYOUTS, ids=str)
def test_every_layout_decodes_to_the_bit_as_mlx_does(scheme: MlxScheme) -> None:
    parts = parts_of(scheme)
    assert torch.equal(dequantize(parts, scheme), parts["dense"])


def test_codes_cross_words_lowest_bits_first() -> None:
    """Eleven codes of 3 bits: the last has two bits in the first word and one in the second."""
    values = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 5]
    stream = sum(value << 3 * number for number, value in enumerate(values))
    words = torch.tensor([[stream & 0xFFFFFFFF, stream >> 32, 0]], dtype=torch.int64).to(torch.uint32)
    assert unpack_codes(words, 3)[0, :12].tolist() == [*values, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_those_of_one_large_number(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(0, 1 << 32, (2, 2 * bits), generator=generator)
    for row, found in zip(words.tolist(), unpack_codes(words.to(torch.uint32), bits).tolist(), strict=True):
        stream = sum(word << 32 * number for number, word in enumerate(row))
        assert found == [stream >> bits * number & (1 << bits) - 1 for number in range(64)]


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (AFFINE, {"scales": None}, "scales: not found"),
        (AFFINE, {"biases": None}, "biases: not found"),
        (AFFINE, {"weight": torch.zeros(3, 32, dtype=torch.int32)}, r"weight: found torch.int32, wanted torch.uint32"),
        (
            AFFINE,
            {"weight": torch.zeros(3, 31, dtype=torch.uint32)},
            "weight: found 31 words a row, wanted whole groups",
        ),
        (AFFINE, {"scales": torch.ones(3, 5)}, r"scales: found shape \[3, 5\], wanted \[3, 4\]"),
        (AFFINE, {"scales": torch.full((3, 4), torch.nan)}, "scales: found 12 NaN"),
        (AFFINE, {"biases": torch.full((3, 4), torch.inf)}, "biases: found 12 NaN or inf"),
        (AFFINE, {"scales": torch.ones(3, 4, dtype=torch.uint8)}, "scales: found torch.uint8"),
        (MlxScheme(4, 32, "mxfp4"), {"scales": torch.full((3, 8), 255, dtype=torch.uint8)}, "scales: found 24 NaN"),
        (MlxScheme(4, 16, "nvfp4"), {"scales": torch.full((3, 16), 127, dtype=torch.uint8)}, "scales: found 48 NaN"),
        (MlxScheme(8, 32, "mxfp8"), {"weight": torch.full((3, 64), 0x7F, dtype=torch.uint32)}, "weight: found 192 NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    scheme: MlxScheme, change: dict[str, Tensor | None], message: str
) -> None:
    parts = {name: part for name, part in (parts_of(scheme) | change).items() if part is not None}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize(parts, scheme, "a.b")


TOP = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        (TOP, MlxScheme(4, 64)),
        (TOP | {"mode": "affine", "a.b": True}, MlxScheme(4, 64)),
        ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, MlxScheme(4, 16, "nvfp4")),
        (TOP | {"a.b": {"group_size": 32, "bits": 6}}, MlxScheme(6, 32)),
        (
            TOP | {"a.b": {"group_size": 32, "bits": 8, "mode": "mxfp8", "quantize_input": False}},
            MlxScheme(8, 32, "mxfp8"),
        ),
        ({"group_size": 32, "bits": 8, "a.b": {}}, MlxScheme(4, 64)),  # the mode's defaults, not the top's values
        (TOP | {"a.b": {"mode": "mxfp4"}}, MlxScheme(4, 32, "mxfp4")),
        (TOP | {"a.c": False}, MlxScheme(4, 64)),
    ],
)
def test_configs_are_read(quantization: dict[str, Any], scheme: MlxScheme) -> None:
    assert read_scheme(quantization, "a.b") == scheme


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (TOP | {"bits": 7}, "quantization: bits: found 7, wanted 2, 3, 4, 5, 6, 8 for mode affine"),
        (TOP | {"bits": True}, "quantization: bits: found True"),
        (TOP | {"group_size": 16}, "quantization: group_size: found 16, wanted 32, 64, 128"),
        (TOP | {"mode": "mxfp4"}, "quantization: group_size: found 64, wanted 32|bits"),
        (TOP | {"mode": ["affine"]}, "quantization: mode: found"),
        (TOP | {"a.b": False}, "quantization: a.b: found False, and a.b stores scales"),
        (TOP | {"a.b": 3}, "quantization: a.b: found 3"),
        (TOP | {"a.b": {"mode": "int4"}}, "quantization: a.b: mode: found 'int4', wanted affine, mxfp4"),
        (TOP | {"a.b": {"bits": [4]}}, r"quantization: a.b: bits: found \[4\]"),
        (
            TOP | {"a.b": {"mode": "nvfp4", "global_scale": True}},
            "quantization: a.b: global_scale: found True, known keys",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"config\.json: {message}"):
        read_scheme(quantization, "a.b")


# ---- whole models ----------------------------------------------------------------------------------------------------


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """By one large number a row, which shares nothing with the reader."""
    rows = []
    for row in codes.int().tolist():
        stream = int("".join(f"{value:0{bits}b}" for value in reversed(row)), 2)
        rows.append(torch.frombuffer(bytearray(stream.to_bytes(len(row) * bits // 8, "little")), dtype=torch.uint32))
    return torch.stack(rows)


def encode(weight: Tensor, scheme: MlxScheme) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, dense weight): affine between a group's ends; mxfp4 and nvfp4 to the nearest level."""
    groups = weight.unflatten(1, (-1, scheme.group_size))
    if scheme.mode == "affine":
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / (2**scheme.bits - 1)).bfloat16()
        biases = low.bfloat16()
        codes = ((groups - biases.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 2**scheme.bits - 1)
        dense = codes * scales.float()[..., None] + biases.float()[..., None]
        return {
            "weight": packed_words(codes.flatten(1), scheme.bits),
            "scales": scales,
            "biases": biases,
        }, dense.flatten(1)
    largest = groups.abs().amax(-1)
    if scheme.mode == "mxfp4":
        exponents = (largest / 6).log2().ceil()
        stored, factors = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
    else:
        scales8 = (largest / 6).to(torch.float8_e4m3fn)
        stored, factors = scales8.view(torch.uint8), scales8.float()
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    codes = (groups[..., None] / factors[..., None, None] - levels).abs().argmin(-1)
    return {"weight": packed_words(codes.flatten(1), 4), "scales": stored}, (
        levels[codes] * factors[..., None]
    ).flatten(1)


def build(
    folder: Path, top: MlxScheme, entries: dict[str, MlxScheme | None] | None = None, base: str = "llama-2"
) -> Path:
    """(as mlx-lm writes it) folder/mlx and folder/dense; `entries`: globs of paths -> their scheme, None for dense."""
    config = json.loads((tiny.base(base) / "config.json").read_text()) | {"dtype": "bfloat16"}
    quantization: dict[str, Any] = top.entry()
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, value in load_file(tiny.base(base) / "model.safetensors").items():
        path = name.removesuffix(".weight")
        own = [scheme for glob, scheme in (entries or {}).items() if fnmatch(path, glob)]
        scheme = own[-1] if own else top
        if value.dim() < 2 or scheme is None:
            stored[name], dense[name] = value, value.float()
            if value.dim() == 2:
                quantization[path] = False
            continue
        if own:
            quantization[path] = scheme.entry()
        parts, dense[name] = encode(value.float(), scheme)
        stored |= {f"{path}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    for directory, tensors, written, metadata in (
        (folder / "mlx", stored, config | {"quantization": quantization, "quantization_config": quantization}, "mlx"),
        (folder / "dense", dense, config | {"dtype": "float32"}, "pt"),
    ):
        tiny.copy_of(tiny.base(base), directory)
        (directory / "config.json").write_text(json.dumps(written))
        save_file(tensors, directory / "model.safetensors", {"format": metadata})
    return folder / "mlx"


MIXED: dict[str, MlxScheme | None] = {
    "*.v_proj": MlxScheme(6, 32),
    "*.down_proj": MlxScheme(3, 32),
    "*.gate_proj": MlxScheme(4, 32, "mxfp4"),
    "*.up_proj": MlxScheme(4, 16, "nvfp4"),
    "*.1.self_attn.o_proj": None,
    "lm_head": MlxScheme(8, 64),
}


@pytest.mark.parametrize("entries", [{}, MIXED], ids=["uniform", "mixed"])
def test_streamed_logits_are_those_of_a_dense_model(entries: dict[str, MlxScheme | None], tmp_path: Path) -> None:
    path = build(tmp_path, MlxScheme(4, 64), entries)
    check_equal(path, tmp_path / "dense")
    checkpoint = open_checkpoint(path)
    assert checkpoint.formats == ("mlx",)
    q_proj = checkpoint.modules["model.layers.0.self_attn.q_proj"]
    assert q_proj.shape == tuple(load_file(tmp_path / "dense" / "model.safetensors")[f"{q_proj.name}.weight"].shape)
    assert q_proj.bits_per_weight == 4.5  # scale and bias of 16 bits for 64 weights
    assert [problem for problem in check_checkpoint(path) if problem.severity == "error"] == []


def test_model_diff_and_check(tmp_path: Path) -> None:
    path, base = build(tmp_path, MlxScheme(3, 32), MIXED), tiny.base("llama-2")
    ids = tiny.rows(2, 12)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    report = tmp_path / "diff.json"
    run(model_diff, "-ma", path, "-mb", base, "--input-ids", tmp_path / "ids.safetensors", "--json", report)
    of_base, of_mlx = (tiny.plain_logits(tiny.plain_model(model), ids) for model in (base, tmp_path / "dense"))
    wanted = float(tiny.plain_kl(of_base, of_mlx).mean())
    assert wanted > 1e-3
    assert json.loads(report.read_text())["kl"]["mean"] == pytest.approx(wanted, rel=1e-3)
    said = run(recompile, "--check", path)
    assert "no inconsistency found" in said
    assert "is stored as mlx, which vllm does not load" in " ".join(said.split())


def test_it_is_a_base_for_variants_with_its_embedding_decoded(tmp_path: Path) -> None:
    path = build(tmp_path, MlxScheme(4, 64))
    run(model_quantize, "-i", path, "-o", tmp_path / "made", "-b", 4, "--no-importance")
    (made,) = (entry for entry in (tmp_path / "made").iterdir() if entry.is_dir())
    assert "quantization" not in json.loads((made / "config.json").read_text())
    name = "model.embed_tokens.weight"
    wanted = load_file(tmp_path / "dense" / "model.safetensors")[name]
    assert torch.equal(load_file(made / "model.safetensors")[name], wanted.bfloat16())


# ---- merges ----------------------------------------------------------------------------------------------------------


def merged(folder: Path, base: Path, taken: dict[str, Path], **how: Any) -> Path:
    overlay = build_overlay(open_checkpoint(base), mixes.recipe(folder / "mix.yaml", taken))
    for _ in execute(plan_write(overlay, folder / "out", **how)):
        pass
    return folder / "out"


def test_a_merge_names_every_path(tmp_path: Path) -> None:
    low, high = build(tmp_path / "low", MlxScheme(3, 32)), build(tmp_path / "high", MlxScheme(4, 64), MIXED)
    out = merged(tmp_path, low, {"*.1.*": high, "lm_head*": high})
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization"]
    assert config["quantization_config"] == quantization
    assert {key: quantization.pop(key) for key in ("group_size", "bits", "mode")} == MlxScheme(3, 32).entry()
    made = open_checkpoint(out)
    assert quantization.keys() == {name for name, module in made.modules.items() if module.is_quantized}
    assert quantization["model.layers.1.mlp.up_proj"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert quantization["model.layers.1.self_attn.q_proj"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert quantization["model.layers.0.self_attn.q_proj"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert quantization["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    stored = load_file(out / "model.safetensors")
    sources = [load_file(path / "model.safetensors") for path in (low, high)]
    dense = [load_file(path.parent / "dense" / "model.safetensors") for path in (low, high)]
    for name, value in stored.items():
        taken = sources[".1." in name or name.startswith("lm_head")]
        assert value.dtype == taken[name].dtype
        assert torch.equal(value.view(torch.uint8), taken[name].view(torch.uint8))
    for name in dense[0]:
        assert torch.equal(made.load(name).float(), dense[".1." in name or name.startswith("lm_head")][name]), name
    assert [problem for problem in check_checkpoint(out) if problem.severity == "error"] == []


def test_one_scheme_needs_no_entries(tmp_path: Path) -> None:
    low, other = build(tmp_path / "low", MlxScheme(4, 64)), build(tmp_path / "other", MlxScheme(4, 64))
    config = json.loads((merged(tmp_path, low, {"*.1.*": other}) / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_layers_of_a_dense_base_are_replaced_and_written_decoded(tmp_path: Path) -> None:
    source, base = build(tmp_path / "source", MlxScheme(5, 64)), tiny.base("llama-2")
    config = json.loads((merged(tmp_path, base, {"*.0.mlp.*": source}) / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 5, "mode": "affine"}
    (tmp_path / "decoded").mkdir()
    out = merged(tmp_path / "decoded", source, {}, dense=True)
    config = json.loads((out / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    wanted = load_file(tmp_path / "source" / "dense" / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(value, wanted[name].bfloat16()), name


def test_other_families_are_refused(tmp_path: Path) -> None:
    source = build(tmp_path / "source", MlxScheme(4, 64))
    other = tiny.variants("llama-2", (4,))[4]
    mix = mixes.recipe(tmp_path / "mix.yaml", {"*.0.mlp.*": other})
    said = refusal(recompile, "-i", source, "-o", tmp_path / "out", "-or", mix)
    assert "mlx" in said
    assert "no engine loads these formats in one model" in said
    assert not (tmp_path / "out").exists()


# ---- checkpoints that loaders would misread --------------------------------------------------------------------------

Q_PROJ = "model.layers.0.self_attn.q_proj"


def changed(folder: Path, **values: Any) -> Path:
    path = build(folder, MlxScheme(4, 64))
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": None}, "config.json has no quantization with bits and group_size"),
        ({"quantization": TOP | {"bits": 8}}, "which is not affine of 8 bits in groups of 64"),
        ({"quantization": TOP | {Q_PROJ: {"bits": 2, "group_size": 64}}}, f"{Q_PROJ} has weight"),
        ({"quantization": TOP | {Q_PROJ: False}}, f"quantization: {Q_PROJ}: found False"),
        ({"quantization": TOP | {Q_PROJ: {"mode": "mxfp4"}}}, "which is not mxfp4 of 4 bits in groups of 32"),
        (
            {"model_type": "olmo"},
            "is an MLX checkpoint of model_type 'olmo', whose tensors mlx-lm may rename",
        ),
    ],
)
def test_configs_that_do_not_say_what_is_stored(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = changed(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        _ = open_checkpoint(path).modules
    assert message in refusal(recompile, "--check", path)


def test_entries_of_what_is_not_stored_are_told(tmp_path: Path) -> None:
    path = changed(tmp_path, quantization=TOP | {"model.norm": TOP, "model.layers.9.mlp": TOP})
    said = [str(problem.message) for problem in check_checkpoint(path)]
    assert "is stored dense, and mlx-lm would look for its scales" in said
    assert "is not stored, and mlx-lm would look for its scales" in said
    assert any(message.startswith("quantization_config is not quantization") for message in said)


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path, MlxScheme(4, 64))
    tensors = load_file(path / "model.safetensors")
    for part in ("weight", "scales", "biases"):
        tensors[f"{Q_PROJ}.{part}"] = torch.stack([tensors[f"{Q_PROJ}.{part}"]] * 2)
    save_file(tensors, path / "model.safetensors", {"format": "mlx"})
    with pytest.raises(FormatError, match="wanted two axes each"):
        _ = open_checkpoint(path).modules


# ---- against mlx-lm, where it is installed ---------------------------------------------------------------------------


def test_mlx_lm_loads_a_merge_with_our_logits(tmp_path: Path) -> None:
    mlx_engine.python()
    low, high = build(tmp_path / "low", MlxScheme(3, 32)), build(tmp_path / "high", MlxScheme(4, 64), MIXED)
    out = merged(tmp_path, low, {"*.1.*": high, "lm_head*": high})
    ids = tiny.rows(2, 12)
    (found,) = mlx_engine.engine_logits([out], ids, tmp_path)
    mlx_engine.assert_same_logits(found, streamed_logits(out, ids))
