"""Swap costs at a mix against finite differences of its true KL, and the KL of a mix against model_diff's."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.diff import DiffOptions, DiffReport, compare
from eval.mixes.oracle import CURVES_KEPT, SAMPLED_EVERY, SAMPLED_FIRST, Curves, MixOracle
from eval.profile.exact import ProfileJob, ProfileOptions
from eval.profile.sketch import estimate
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.errors import RecompileError
from recompile.merge.overlay import Overlay
from recompile.optimize.problem import Group, Option, Problem
from recompile.optimize.refine import refine
from tests import tiny

BITS = (2, 4, 8)


def with_another_head(variant: Path) -> Path:
    """A copy of a variant whose head is rounded, as EXL and MLX builds have it."""
    copy = tiny.copy_of(variant, Path(tempfile.mkdtemp()) / variant.name)
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (head * 8 / head.abs().max()).round() * head.abs().max() / 8
    save_file(tensors, path, {"format": "pt"})
    return copy


FLOAT32 = DiffOptions(dtype=torch.float32)


def oracle(architecture: str, level: str = "tensor") -> MixOracle:
    architecture, _, head = architecture.partition("+")
    made = {b: with_another_head(d) if head else d for b, d in tiny.variants(architecture, BITS).items()}
    candidates = {str(b): open_checkpoint(d) for b, d in made.items()}
    base = open_checkpoint(tiny.base(architecture))
    rows = tiny.rows(12, 16)
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    header = ProfileJob(base, 4, given, rows, Path(), ProfileOptions(level=level)).header(torch.float32)
    return MixOracle(header, candidates, base, rows[8:], pool=rows[:8], rows_per_step=4, options=FLOAT32)


@pytest.mark.parametrize("architecture", ["llama", "llama+head", "qwen3-moe", "gemma2"])
def test_the_first_order_is_the_slope_of_the_kl(architecture: str) -> None:
    made = oracle(architecture)
    choice = {group.name: ("2", "4")[number % 2] for number, group in enumerate(made.header.groups)}
    model = made.linearise(choice, 0)
    ids = made.pool[: made.rows_per_step]
    mix = Overlay.of_choice(made.header, made.checkpoints, choice)
    dense = tiny.plain_model(tiny.base(architecture.partition("+")[0]))
    dense.set_experts_implementation("eager")  # the grouped product knows no float64
    dense.double()
    wanted = tiny.plain_logits(dense, ids)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(made._quick[1].load_parameter(name, mix))
    assert model.kl_nats == pytest.approx(float(tiny.plain_kl(wanted, tiny.plain_logits(dense, ids)).mean()), rel=1e-4)
    step = 1e-3
    checked = 0
    for group in made.header.groups:
        if "router" in group.name or group.name.endswith("mlp.gate"):
            continue
        names = made._quick[1].parameters_of(group.modules[0])
        for source in ("2", "8"):
            if source == choice[group.name] or len(made._quick[1].origins[names[0]].tensors) > 1:
                continue
            (name,) = names
            parameter = dense.get_parameter(name)
            kept = parameter.data
            change = made._quick[1].load_parameter(name, made.checkpoints[source]).double() - kept
            sides = []
            for sign in (1, -1):
                parameter.data = kept + sign * step * change
                sides.append(float(tiny.plain_kl(wanted, tiny.plain_logits(dense, ids)).mean()))
            parameter.data = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            found = model.slope[(group.name, source)] - model.slope[(group.name, choice[group.name])]
            assert found == pytest.approx(slope, rel=2e-3, abs=1e-4), (group.name, source)
            checked += 1
    assert checked >= 8
    assert all(value > 0 for value in model.own.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gemma2"])
@pytest.mark.parametrize("level", [pytest.param("tensor", marks=pytest.mark.sweep), "layer"])
def test_swaps_change_what_whole_mixes_measure(architecture: str, level: str) -> None:
    made = oracle(architecture, level)
    names = [group.name for group in made.header.groups]
    choice = {name: ("2", "4")[number % 2] for number, name in enumerate(names)}
    swaps = [{name: "8"} for name in reversed(names)] + [{names[0]: "8", names[-1]: "2"}]  # the last is of two layers
    found = made.changes(choice, swaps, 1)
    at_rows = replace(made, accept=made.pool[4:8])
    here = at_rows.measure(choice)
    for swap, changes in zip(swaps, found, strict=True):
        there = at_rows.measure({**choice, **swap})
        assert changes == pytest.approx([b - a for a, b in zip(here, there, strict=True)], abs=2e-6), swap
    assert sum(max(map(abs, changes)) > 1e-4 for changes in found) > len(found) // 2


def test_a_swapped_head_is_run_with_that_head() -> None:
    made_of = {b: tiny.variants("qwen3-moe", (b,), head_bits=b)[b] for b in (2, 4)}
    candidates = {str(b): open_checkpoint(directory) for b, directory in made_of.items()}
    base, rows = open_checkpoint(tiny.base("qwen3-moe")), tiny.rows(12, 16)
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    options = ProfileOptions(level="tensor", head=True)
    header = ProfileJob(base, 4, given, rows, Path(), options).header(torch.float32)
    made = MixOracle(header, candidates, base, rows[:4], pool=rows[:8], rows_per_step=4, options=FLOAT32)
    (head,) = (group.name for group in header.groups if group.layer is None)
    choice = {group.name: "4" for group in header.groups}
    changes, _ = made.changes(choice, [{head: "2"}, {header.groups[0].name: "2"}], 0)
    there, here = made.measure({**choice, head: "2"}), made.measure(choice)
    assert changes == pytest.approx([b - a for a, b in zip(here, there, strict=True)], abs=2e-6)
    assert max(map(abs, changes)) > 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gemma2"])
def test_slopes_without_samples_are_those_with_them(architecture: str) -> None:
    made = oracle(architecture)
    choice = {group.name: ("2", "4")[number % 2] for number, group in enumerate(made.header.groups)}
    sampled = made.linearise(choice, 0)
    made._curves.asked = SAMPLED_FIRST + 1
    assert made._curves.asked % SAMPLED_EVERY
    drawn = []
    estimated = estimate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.mixes.oracle.estimate", lambda *args: drawn.append(args) or estimated(*args))
        plain = made.linearise(choice, 0)
    assert not drawn
    assert plain.kl_nats == pytest.approx(sampled.kl_nats, rel=1e-6)
    assert plain.slope == pytest.approx(sampled.slope, rel=1e-3, abs=1e-5)
    assert plain.own == sampled.own
    assert plain.cross == sampled.cross


def test_curves_are_averages_and_cross_terms_follow_the_choice() -> None:
    curves = Curves()
    curves.add({("g", "2"): 4.0, ("g", "3"): 1.0}, {("2", "3"): 0.5, ("3", "2"): 0.5})
    assert curves.cross({"g": "2"}) == {("g", "2"): 8.0, ("g", "3"): pytest.approx(2 * 0.5 * 2.0)}
    assert curves.cross({"g": "3"}) == {("g", "2"): pytest.approx(2 * 0.5 * 2.0), ("g", "3"): 2.0}
    curves.add({("g", "2"): 2.0, ("g", "3"): 3.0}, {})
    assert curves.own["g", "2"] == pytest.approx((CURVES_KEPT * 4 + 2) / (CURVES_KEPT + 1))


def test_what_is_held_stays_below_the_cap_and_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tight = oracle("llama"), oracle("llama")  # making their variants reads the base, too
    assert (made._plan.total > 0, tight._plan.total > 0) == (
        True,
        True,
    )  # and so does planning: the embedding, for its states
    loads: list[tuple[str, str]] = []
    load = Checkpoint.load

    def counted(self: Checkpoint, tensor: str, **kwargs: Any) -> torch.Tensor:
        loads.append((self.label, tensor))
        return load(self, tensor, **kwargs)

    monkeypatch.setattr(Checkpoint, "load", counted)
    choice = dict.fromkeys((group.name for group in made.header.groups), "2")
    wanted = made.linearise(choice, 0)
    assert len(set(loads)) == len(loads) > 0
    tight.max_memory_bytes = tight._plan.total
    loads.clear()
    assert tight.linearise(choice, 0) == wanted
    assert tight._store.limit_bytes == tight._store.held_bytes == 0
    assert len(set(loads)) < len(loads)
    loads.clear()
    replace(oracle("llama"), holds=False).linearise(choice, 0)
    assert len(set(loads)) < len(loads)
    some = oracle("llama")
    some.max_memory_bytes = some._plan.total + 50_000
    some.linearise(choice, 0)
    assert 0 < some._store.held_bytes <= some._store.limit_bytes <= 50_000


def test_the_kl_of_a_mix_is_that_of_model_diff() -> None:
    made = oracle("llama")
    choice = {group.name: ("2", "8")[number % 2] for number, group in enumerate(made.header.groups)}
    mix = Overlay.of_choice(made.header, made.checkpoints, choice)
    *_, report = compare(mix, made.reference, made.accept)
    assert isinstance(report, DiffReport)
    np.testing.assert_allclose(made.measure(choice), report.kl_rows, rtol=1e-4)


def test_large_kls_may_be_measured_in_the_quickest_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.mixes.meter.sketch_dtype", lambda device: torch.bfloat16)
    exact = oracle("llama")
    bad, good = (dict.fromkeys((group.name for group in exact.header.groups), source) for source in ("2", "8"))
    limit = float(np.mean(exact.measure(bad))) / 2
    assert limit > np.mean(exact.measure(good))
    for first, rough in ((bad, True), (good, False)):
        made = replace(oracle("llama"), options=DiffOptions(), rough_above_nats=limit)
        found = [made.measure(first), made.measure(bad)]
        assert (found[1] != exact.measure(bad)) == rough
        assert found[1] == pytest.approx(exact.measure(bad), rel=0.05)
        assert made.measure(first) == found[0]
        other = good if first is bad else bad  # by itself it would be measured in the other type
        again = replace(oracle("llama"), options=DiffOptions(), rough_above_nats=limit, rough=made.rough)
        assert again.measure(other) == made.measure(other)


def test_refining_a_real_model_lowers_its_kl_within_the_budget() -> None:
    made = oracle("llama")
    problem = Problem(
        tuple(
            Group(g.name, tuple(Option(s, bits, float("nan")) for s, bits in g.bits.items()))
            for g in made.header.groups
        )
    )
    choice = {group.name: ("2", "8")[number % 2] for number, group in enumerate(made.header.groups)}
    budget = sum(group.bits[choice[group.name]] for group in made.header.groups)
    before = np.mean(made.measure(choice))
    *_, last = refine(problem, budget, choice, made, steps=2)
    assert last.bits <= budget
    assert last.kl_nats == pytest.approx(np.mean(made.measure(last.choice)), rel=1e-6)
    assert last.kl_nats < before


def test_making_candidates_counts_in_the_memory_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    made, costly = (replace(oracle("llama"), max_memory_bytes=64 * 2**30) for _ in range(2))
    choice = dict.fromkeys((group.name for group in made.header.groups), made.header.base)
    made.linearise(choice, 0)
    monkeypatch.setattr("eval.mixes.oracle.making_bytes", lambda candidates: 64 * 2**30)
    with pytest.raises(RecompileError, match="max_memory 65536 MiB is too little"):
        costly.linearise(choice, 0)
