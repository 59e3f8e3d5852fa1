"""Rows of which some places count, as those of a trace: every measurement is of these places alone, and neither padding
nor its tokens change anything."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.diff import DiffOptions, DiffReport, compare
from eval.heal import Healing, HealOptions, HealReport, heal
from eval.heal_rows import HealRows
from eval.mixes.evaluator import MixEvaluator
from eval.mixes.oracle import MixOracle
from eval.passes.adjoint import AdjointPass, LayerBackward, plan_pass
from eval.passes.fisher import FisherCotangents
from eval.passes.output_gradients import GradientOptions, measure_outputs
from eval.profile.exact import ProfileJob, ProfileOptions, make_groups, profile_exact
from eval.profile.sketch import SketchOptions, profile_sketch
from eval.profile.weights import profile_weights
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, layer_index
from recompile.merge.overlay import Overlay
from recompile.model.counted import row_means, spread
from recompile.model.stream import LayeredModel
from recompile.quantize.activation_stats import collect_moments
from recompile.quantize.calibrate import input_power
from recompile.quantize.gguf import Importance, collect_importance
from recompile.quantize.gguf_rounding import InputHessians
from recompile.quantize.output_statistics import StoredStatistics
from tests import tiny
from tests.eval.test_sketch import dense_changes

BITS = (2, 4)
LENGTHS = (9, 16, 24, 14)
FIRST = (4, 9, 3, 6)  # the first place that counts, a row
WIDTH = 30  # six more than the longest


def padded(padding: int, width: int = WIDTH) -> Tensor:
    ids = tiny.rows(len(LENGTHS), WIDTH)[:, :width].clone()
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = padding
    return ids


def counted(width: int = WIDTH) -> Tensor:
    """Up to the last but one token of every row, as a trace's responses are."""
    places = torch.arange(width)[None]
    first, last = torch.tensor(FIRST)[:, None], torch.tensor(LENGTHS)[:, None] - 1
    return (places >= first) & (places < last)


def checkpoints(architecture: str) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base = open_checkpoint(tiny.base(architecture))
    return base, {str(b): open_checkpoint(d) for b, d in tiny.variants(architecture, BITS).items()}


def job(architecture: str, path: Path, ids: Tensor, level: str = "tensor") -> ProfileJob:
    base, candidates = checkpoints(architecture)
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    made = ProfileJob(base, 4, given, ids, path, ProfileOptions(level=level), counted=counted(ids.shape[1]))
    return replace(made, rows_sha256=path.name)


def last_profile(events: object) -> Profile:
    *_, profile = events  # type: ignore[misc]
    assert isinstance(profile, Profile)
    return profile


# ---- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["gemma2", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("llama-2", "qwen3-moe"))]
)  # gemma2: a soft cap after the head
def test_exact_costs_are_those_of_model_diff(architecture: str, tmp_path: Path) -> None:
    made = job(architecture, tmp_path / "p.jsonl", padded(0))
    profile = last_profile(profile_exact(made))
    again = last_profile(profile_exact(job(architecture, tmp_path / "again.jsonl", padded(77))))
    assert again.measurements == profile.measurements
    base, candidates = checkpoints(architecture)
    header = replace(profile.header, base="reference")
    sources = {**candidates, "reference": base}
    choice = dict.fromkeys((group.name for group in profile.header.groups), "reference")
    swaps = [swap for swap, found in profile.measurements.items() if found.reached][::3]
    mixes = [Overlay.of_choice(header, sources, {**choice, group: source}) for group, source in swaps]
    options = DiffOptions(lengths=LENGTHS, counted=counted())
    for swap, mix in zip(swaps, mixes, strict=True):
        *_, report = compare(mix, base, padded(0), options)
        assert isinstance(report, DiffReport)
        assert profile.measurements[swap].kl_rows == pytest.approx(report.kl_rows, abs=2e-6), swap
    assert max(profile.measurements[swap].mean for swap in swaps) > 1e-3


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_an_expert_that_padding_alone_reached_is_not_measured(mode: str, tmp_path: Path) -> None:
    def unreached(name: str, ids: Tensor, meant: Tensor) -> list[str]:
        made = replace(job("qwen3-moe", tmp_path / name, ids), counted=meant)
        if mode == "exact":
            return last_profile(profile_exact(made)).unreached()
        return last_profile(profile_sketch(made, SketchOptions(samples=2, shrink=False))).unreached()

    short, meant = tiny.rows(1, 3), torch.tensor([[True, True, False]])
    alone = unreached("alone.jsonl", short, meant)
    long = torch.cat([short, tiny.rows(1, 60, seed=9)], 1)
    with_padding = unreached("long.jsonl", long, torch.cat([meant, torch.zeros(1, 60, dtype=torch.bool)], 1))
    assert alone
    assert with_padding == alone


@pytest.mark.parametrize("architecture", ["llama-2", pytest.param("gemma2", marks=pytest.mark.sweep)])
def test_samples_are_unbiased_for_the_places_that_count(architecture: str) -> None:
    samples, width = 500, 12
    ids, meant = tiny.rows(2, width), torch.zeros(2, width, dtype=torch.bool)
    meant[0, 3:8] = meant[1, 6:11] = True
    meant[1, 7] = False
    base, candidates = checkpoints(architecture)
    model = LayeredModel.of(base)
    groups = make_groups(candidates, ProfileOptions(level="tensor"))
    plan = plan_pass(model, groups, len(candidates), 2, width, samples)
    cotangents = FisherCotangents(model, candidates, groups, samples, counted=meant)
    found = {}
    for event in AdjointPass(model, base, candidates, groups, plan).run(ids, cotangents):
        if isinstance(event, LayerBackward):
            found.update({(swap.group, swap.source): swap for swap in event.swaps})
    logits, changes = dense_changes(architecture, ids)
    p = logits.softmax(-1)
    off = []
    for swap, change in changes.items():
        inner = (p * change * change).sum(-1) - (p * change).sum(-1) ** 2  # [rows, tokens]
        wanted = torch.stack([row[marks].mean() / 2 for row, marks in zip(inner, meant, strict=True)])
        values = found[swap].products.double().square() / (2 * width)
        off.append((values.mean(1) - wanted) / (values.std(1) / samples**0.5))
    z = torch.cat(off)  # standard normal if unbiased; those of one row share their samples
    assert float(z.abs().max()) < 4.5
    assert abs(float(z.mean())) < 1


@pytest.mark.parametrize("mode", ["sketch", "diagonal"])
def test_a_sketch_sees_no_padding_and_is_near_the_exact_costs(mode: str, tmp_path: Path) -> None:
    made = [job("llama-2", tmp_path / f"{padding}.jsonl", padded(padding)) for padding in (0, 77)]
    one, other = (last_profile(profile_sketch(each, SketchOptions(samples=32, mode=mode))) for each in made)
    for swap, found in one.measurements.items():
        assert found.kl_rows == pytest.approx(other.measurements[swap].kl_rows, rel=1e-4)
    narrow = [job("llama-2", tmp_path / f"n{padding}.jsonl", padded(padding, 24)) for padding in (0, 77)]
    exact = last_profile(profile_exact(replace(narrow[0], path=tmp_path / "exact.jsonl")))
    ratios = [one.measurements[swap].mean / found.mean for swap, found in exact.measurements.items()]
    middle = sorted(ratios)[len(ratios) // 2]
    assert 0.5 < middle < 2


def test_scores_of_weights_count_the_inputs_of_the_places(tmp_path: Path) -> None:
    profiles = [last_profile(profile_weights(job("llama-2", tmp_path / f"{n}.jsonl", padded(n)))) for n in (0, 77)]
    assert profiles[0].measurements == profiles[1].measurements


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-2", "qwen3-moe"])
def test_importance_and_moments_are_of_the_places(architecture: str) -> None:
    base = open_checkpoint(tiny.base(architecture, dtype=torch.float32))
    meant = counted()
    importance: list[Importance] = []
    for padding in (0, 77):
        *_, last = collect_importance(base, padded(padding), counted=meant)
        assert isinstance(last, Importance)
        importance.append(last)
    power = input_power(base, padded(0), counted=meant)
    hessians = InputHessians(base, padded(77), counted=meant)
    assert hessians.of("model.layers.0.self_attn.q_proj", 0) is not None
    moments = {
        name: found
        for layer in collect_moments(LayeredModel.of(base), padded(77), head=True, counted=meant)
        for found in layer
        for name in found.modules
    }
    head = next(name for name in importance[0].values if "head" in name or "embed" in name)
    assert importance[0].tokens[head] == int(meant.sum())
    for name, value in importance[0].values.items():
        torch.testing.assert_close(importance[1].values[name], value, rtol=1e-5, atol=1e-7)
        if name not in moments:
            continue
        found = moments[name]
        torch.testing.assert_close(found.sum_squares.sum(0) / int(found.tokens.sum()), value, rtol=1e-4, atol=1e-6)
        of_head = name == head
        hessian = hessians.of(name, None if of_head else layer_index(name))
        assert hessian is not None
        count = importance[0].tokens[name]
        torch.testing.assert_close(hessian.diagonal() / count, value, rtol=1e-4, atol=1e-6)
        if not of_head:
            torch.testing.assert_close(power[name], value, rtol=1e-5, atol=1e-7)
            if ".experts." not in name:
                assert found.tokens.tolist() == meant.sum(1).tolist()


def test_gradients_at_outputs_are_of_the_places(tmp_path: Path) -> None:
    base, meant = open_checkpoint(tiny.base("llama-2")), counted()
    options = GradientOptions(samples=2, dtype=torch.float32)

    def measured(name: str, ids: Tensor, places: Tensor) -> StoredStatistics:
        *_, last = measure_outputs(base, ids, tmp_path / name, options, counted=places)
        assert isinstance(last, StoredStatistics)
        return last

    one, other = measured("0", padded(0), meant), measured("77", padded(77), meant)
    name = "model.layers.0.self_attn.k_proj"
    assert one.modules[name][1:] == (2 * int(meant[:3].sum()), 2 * int(meant[3].sum()))
    cpu = torch.device("cpu")
    for module in one.modules:
        found, again = one.of(module, cpu), other.of(module, cpu)
        assert found is not None
        assert again is not None
        torch.testing.assert_close(found.fit, again.fit)


# ---- whole mixes -----------------------------------------------------------------------------------------------------


def oracle(architecture: str, ids: Tensor, meant: Tensor) -> MixOracle:
    base, candidates = checkpoints(architecture)
    header = job(architecture, Path("p"), ids).header(torch.float32)
    how = DiffOptions(dtype=torch.float32, counted=meant)
    return MixOracle(header, candidates, base, ids, options=how, pool=ids, pool_counted=meant, rows_per_step=4)


@pytest.mark.parametrize("architecture", ["llama-2", "gemma2"])
def test_slopes_at_a_mix_are_of_the_places(architecture: str) -> None:
    made = oracle(architecture, padded(0), counted())
    choice = {group.name: ("2", "4")[number % 2] for number, group in enumerate(made.header.groups)}
    model = made.linearise(choice, 0)
    base, candidates = checkpoints(architecture)
    evaluator = MixEvaluator(made.header, candidates, base, options=DiffOptions(lengths=LENGTHS, counted=counted()))
    (rows,) = evaluator.kl_rows([choice], padded(0))
    assert made.measure(choice) == pytest.approx(rows, abs=2e-6)
    assert model.kl_nats == pytest.approx(math.fsum(rows) / len(rows), abs=2e-6)
    names = [group.name for group in made.header.groups]
    found = made.changes(choice, [{names[0]: "4"}, {names[-1]: "2"}], 0)
    for swap, changes in zip([{names[0]: "4"}, {names[-1]: "2"}], found, strict=True):
        there = made.measure({**choice, **swap})
        assert changes == pytest.approx([b - a for a, b in zip(rows, there, strict=True)], abs=4e-6)
    dense, reference = (tiny.plain_model(base.path).double() for _ in range(2))
    mix = Overlay.of_choice(made.header, candidates, choice)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(made._quick[1].load_parameter(name, mix))
    ids, wanted = padded(77), tiny.plain_logits(reference, padded(77))

    def kl() -> float:
        found = tiny.plain_kl(wanted, tiny.plain_logits(dense, ids))
        return float(row_means(found, counted()).mean())

    assert model.kl_nats == pytest.approx(kl(), rel=1e-4)
    for group in made.header.groups[::3]:
        parameter = dense.get_parameter(f"{group.modules[0]}.weight")
        other = "2" if choice[group.name] == "4" else "4"
        kept, sides = parameter.data, []
        change = candidates[other].load(f"{group.modules[0]}.weight").double() - kept
        for sign in (1, -1):
            parameter.data = kept + sign * 1e-3 * change
            sides.append(kl())
        parameter.data = kept
        slope = model.slope[group.name, other] - model.slope[group.name, choice[group.name]]
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=3e-3, abs=1e-4)


# ---- healing ---------------------------------------------------------------------------------------------------------


def healing_rows(padding: int) -> HealRows:
    ids, meant = padded(padding), counted()
    names = ("train", "choose", "accept", "report")
    return HealRows(**dict.fromkeys(names, ids), second=tiny.rows(2, 8), counted=dict.fromkeys(names, meant))


HEALING = HealOptions(tokens=6 * WIDTH, batch_tokens=2 * WIDTH, check_every=2, learning_rate=0.01, dtype=torch.float32)


def test_healing_lowers_the_kl_of_the_places(tmp_path: Path) -> None:
    base, build = open_checkpoint(tiny.base("llama-2")), open_checkpoint(tiny.variants("llama-2", (2,))[2])
    reports = []
    for padding in (0, 77):
        *_, last = heal(build, base, tmp_path / str(padding), healing_rows(padding), HEALING)
        assert isinstance(last, HealReport)
        reports.append(last)
    assert asdict(reports[0].accept) == pytest.approx(asdict(reports[1].accept), rel=1e-4)
    *_, report = compare(build, base, padded(0), DiffOptions(lengths=LENGTHS, counted=counted()))
    assert isinstance(report, DiffReport)
    assert reports[0].accept.before == pytest.approx(math.fsum(report.kl_rows) / len(LENGTHS), abs=2e-6)
    assert reports[0].accept.after < reports[0].accept.before


@pytest.mark.parametrize("architecture", ["llama-2", "gemma2"])
def test_the_gradient_of_healing_is_of_the_places(architecture: str, tmp_path: Path) -> None:
    """The loss of a step, and what a small change of one scale does to it."""
    base, build = open_checkpoint(tiny.base(architecture)), open_checkpoint(tiny.variants(architecture, (3,))[3])
    made = Healing(build, base, tmp_path / "out", healing_rows(77), HEALING)
    ids, meant = padded(77), counted()
    teacher = made.teacher_states(ids)
    gradients: dict[str, Tensor] = {}
    made.adam.step = lambda movables, found, rate: gradients.update(found)  # type: ignore[method-assign]
    loss = made.step(ids, teacher, meant)

    def mean_kl() -> float:
        rows = torch.tensor(made.row_kls("accept", teacher), dtype=torch.float64)
        shares = meant.sum(1) / meant.sum()
        return float((rows * shares).sum())

    assert loss == pytest.approx(mean_kl(), abs=2e-6)
    name = next(name for name in gradients if "down_proj" in name)
    movable, step = made.movables[name], 2e-2
    sides = []
    for sign in (1, -1):
        movable.delta = sign * step * gradients[name].sign()
        sides.append(mean_kl())
    slope = (sides[0] - sides[1]) / (2 * step)
    assert float(gradients[name].abs().sum()) == pytest.approx(slope, rel=0.05, abs=2e-5)


# ---- the helpers -----------------------------------------------------------------------------------------------------


def test_spread_puts_values_at_their_places() -> None:
    values, places = torch.tensor([[[1.0], [2.0]]]), torch.tensor([1, 3])
    assert spread(values, places, 5).flatten().tolist() == [0, 1, 0, 2, 0]
    assert spread(values, None, 2) is values


def test_row_means_are_over_what_counts() -> None:
    values = torch.tensor([[1.0, 2.0, math.inf], [4.0, 5.0, 6.0]])
    meant = torch.tensor([[True, True, False], [False, False, True]])
    assert row_means(values, meant).tolist() == [1.5, 6.0]
