"""A number that is not finite stops every way to a figure, with model, layer and row named; it is never a figure.

The model here is whole in float32 and leaves the range of float16 (65,504) in layer 1; or one token of row 2 does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.diff import DiffOptions
from eval.mixes.oracle import MixOracle
from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.sketch import SketchOptions, SweepStore, profile_sketch
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Measurement, Profile, load_profile, open_journal
from recompile.errors import JournalError, NotFiniteError
from recompile.formats.checks import is_finite
from recompile.model.finite import FiniteWatch
from recompile.model.stream import LayeredModel
from recompile.quantize.activation_stats import collect_moments
from recompile.quantize.calibrate import input_power
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.gguf import collect_importance
from recompile.quantize.lazy_variant import make_variants, spec_of
from recompile.quantize.pipeline import BuildOptions, quantize_model
from tests import tiny
from tests.journals import unsealed

HALF = torch.float16


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny llama whose states pass 65,504 in layer 1, for every token."""
    path = tiny.copy_of(tiny.base("llama"), tmp_path_factory.mktemp("loud") / "loud")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(3e4)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def loud_variant(loud: Path) -> Path:
    return tiny.quantize(loud, loud.parent, (4,))[4]


def job_of(base: Path, candidates: list[Checkpoint], path: Path, dtype: torch.dtype, **options: str) -> ProfileJob:
    given = list(enumerate(candidates, start=2))
    return ProfileJob(open_checkpoint(base), 2, given, tiny.rows(3, 8), path, ProfileOptions(dtype=dtype, **options))


def run(events: object) -> list[object]:
    return list(events)  # type: ignore[call-overload]


def oracle(base: Path, step: str) -> None:
    reference = open_checkpoint(base)
    candidates = variants(base)
    header = job_of(base, candidates, Path(), HALF).header(HALF)
    rows = tiny.rows(3, 8)
    made = MixOracle(
        header,
        dict(zip(("2", "3"), candidates, strict=True)),
        reference,
        rows,
        pool=rows,
        options=DiffOptions(dtype=HALF),
    )
    choice = {group.name: "3" for group in header.groups}
    if step == "linearise":
        made.linearise(choice, 0)
    elif step == "measure":
        made.measure(choice)
    else:
        made.changes(choice, [{header.groups[0].name: "2"}], 0)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "exact profile": lambda base, out: run(profile_exact(job_of(base, variants(base), out / "p.jsonl", HALF))),
    "sketch": lambda base, out: run(
        profile_sketch(job_of(base, variants(base), out / "p.jsonl", HALF), SketchOptions(samples=2))
    ),
    "squared gradients": lambda base, out: run(
        profile_sketch(job_of(base, variants(base), out / "p.jsonl", HALF), SketchOptions(samples=2, mode="diagonal"))
    ),
    "refine, slopes": lambda base, out: oracle(base, "linearise"),
    "refine, whole mixes": lambda base, out: oracle(base, "measure"),
    "refine, swaps": lambda base, out: oracle(base, "changes"),
    "input power": lambda base, out: input_power(open_checkpoint(base), tiny.rows(3, 8), dtype=HALF),
    "moments": lambda base, out: run(
        collect_moments(LayeredModel.of(open_checkpoint(base), dtype=HALF), tiny.rows(3, 8), head=True)
    ),
    "importance": lambda base, out: run(collect_importance(open_checkpoint(base), tiny.rows(3, 8), dtype=HALF)),
    "gptq": lambda base, out: run(
        quantize_model(
            open_checkpoint(base),
            out,
            IntEncoder((4,), 32, True, "gptq"),
            tiny.rows(3, 8),
            BuildOptions(dtype=HALF),
        )
    ),
}


def variants(base: Path) -> list[Checkpoint]:
    specs = [spec_of(name, group_size=32) for name in ("2", "4")]
    return [made for _, made in make_variants(open_checkpoint(base), specs)]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_figure_stops(way: str, loud: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"loud: layer 1, row 1: .*float16.*use a wider dtype"):
        WAYS[way](loud, tmp_path)
    for file in tmp_path.rglob("*.jsonl"):
        assert len(file.read_text().splitlines()) <= 1, "no line but the header"
    assert not list(tmp_path.rglob("sweep-*")), "no sum is kept"
    assert not (tmp_path / "4bpw").exists()


def test_an_exact_profile_names_the_swap(loud_variant: Path, tmp_path: Path) -> None:
    """The reference is whole; only what one candidate is swapped in is not."""
    calm = open_checkpoint(tiny.variants("llama", (4,))[4])
    job = job_of(tiny.base("llama"), [calm, open_checkpoint(loud_variant)], tmp_path / "p.jsonl", HALF, level="tensor")
    where = r"model\.layers\.1\.mlp\.down_proj from 3, row 1: hidden states are NaN or infinite"
    with pytest.raises(NotFiniteError, match=where):
        run(profile_exact(job))
    kept = load_profile(tmp_path / "p.jsonl")
    assert kept.measurements, "what came before stays"
    assert all(math.isfinite(value) for found in kept.measurements.values() for value in found.kl_rows)
    wide = replace(job, path=tmp_path / "wide.jsonl", options=replace(job.options, dtype=torch.float32))
    *_, profile = run(profile_exact(wide))
    assert isinstance(profile, Profile)
    assert profile.is_complete


def test_a_sketch_names_the_swap(loud_variant: Path, tmp_path: Path) -> None:
    calm = open_checkpoint(tiny.variants("llama", (4,))[4])
    job = job_of(tiny.base("llama"), [calm, open_checkpoint(loud_variant)], tmp_path / "p.jsonl", HALF, level="tensor")
    with pytest.raises(
        NotFiniteError, match=r"layer 1: model\.layers\.1\.mlp\.down_proj from 3, row \d: what it changes"
    ):
        run(profile_sketch(job, SketchOptions(samples=2)))


# ---- what is kept in files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_measurement_holds_a_value_that_is_no_number(bad: float) -> None:
    with pytest.raises(NotFiniteError, match=r"g from 4, row 2: its KL is"):
        Measurement("g", "4", (0.5, bad))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[0.5, NaN, 0.1]", r"kl_rows\[1\]: nan, wanted a finite number"),
        ("[Infinity, 0.1, 0.1]", r"kl_rows\[0\]: inf, wanted a finite number"),
        ("[0.5, 0.1, -0.25]", "row 3: its KL is -0.25 nats a token"),
        ('[0.5, 0.1, "nan"]', r'kl_rows\[2\]: the text "nan", wanted a number'),
    ],
)
def test_a_journal_with_such_a_line_is_refused(values: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    job = job_of(tiny.base("llama"), variants(tiny.base("llama")), path, torch.float32)
    header = job.header(torch.float32)
    group = header.groups[0].name
    with open_journal(path, header) as journal:
        journal.append([Measurement(group, "2", (0.5, 0.25, -1e-7))])  # rounding may take a KL of 0 that far
        with pytest.raises(NotFiniteError, match="no KL is below 0"):
            journal.append([Measurement(group, "3", (0.5, 0.25, -0.25))])
    assert load_profile(path).measurements[group, "2"].kl_rows == (0.5, 0.25, -1e-7)
    with unsealed(path).open("a") as file:
        file.write(f'{{"group": {json.dumps(group)}, "source": "3", "kl_rows": {values}}}\n')
    for read in (load_profile, lambda path: open_journal(path, header)):
        with pytest.raises(JournalError, match=rf"p\.jsonl:3: .*{message}"):
            read(path)


def test_sums_of_a_sweep_are_numbers_when_written_and_when_read(tmp_path: Path) -> None:
    base = tiny.base("llama")
    job = job_of(base, variants(base), tmp_path / "p.jsonl", torch.float32)
    run(profile_sketch(job, SketchOptions(samples=2)))
    header = load_profile(job.path).header
    store = SweepStore(job.path, header)
    sketch = store.one(0)
    damaged = replace(sketch, squares=np.where(np.arange(sketch.squares.shape[1]) == 1, np.nan, sketch.squares))
    with pytest.raises(NotFiniteError, match=r"sweep-0001\.safetensors: squares"):
        store.save(1, damaged)
    assert [file.name for file in store.folder.iterdir()] == ["sweep-0000.safetensors"]
    tensors = load_file(store.folder / "sweep-0000.safetensors")
    tensors["products2"][0, 0] = math.inf
    from safetensors import safe_open

    with safe_open(store.folder / "sweep-0000.safetensors", "pt") as file:
        about = {key: value for key, value in file.metadata().items() if key != "crc32"}
    save_file(tensors, store.folder / "sweep-0000.safetensors", about)
    with pytest.raises(NotFiniteError, match=r"sweep-0000\.safetensors: products2: 1 of \d+ values"):
        run(profile_sketch(job, SketchOptions(samples=2)))


# ---- the check itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.zeros(3, 500)
    values[:, ::2] = 400.0  # a float16 sum of these would overflow
    values = values.to(dtype)
    assert is_finite(values)
    if dtype == torch.float8_e4m3fn and math.isinf(bad):
        return  # it has no infinities
    values[1, 77] = bad
    assert not is_finite(values)
    assert not is_finite(values.T)


def test_values_whose_sum_overflows_are_numbers_still() -> None:
    assert is_finite(torch.full((10,), 3e38))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([1, 2]))


def test_a_watch_names_the_first_of_what_waited() -> None:
    """As on a device, where nothing is asked of a state until it is settled."""
    watch = FiniteWatch()
    state = torch.ones(4, 3, 2)
    watch.see(state, "m", "layer 0", 8)
    bad = state.clone()
    bad[2, 1, 1] = math.nan
    with pytest.raises(NotFiniteError, match=r"m: layer 1, row 11: hidden states are NaN or infinite in float32"):
        watch.see(bad, "m", "layer 1", 8)
    watch.settle()  # told once
    module = torch.nn.Linear(2, 2)
    module.weight.data[0, 0] = math.inf
    with pytest.raises(NotFiniteError, match=r"m: layer 1, row 3: .*so is its weight"):
        watch.see(bad, "m", "layer 1", 0, module)
