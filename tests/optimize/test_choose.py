"""A profile and a budget to a recipe: what the file says is what was chosen, for any model, budget and constraint."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import LEVELS, Measurement, Profile, layer_index
from recompile.errors import BudgetError, RecompileError
from recompile.merge.overlay import build_overlay
from recompile.optimize.choose import Budget, Choice, Constraint, choose, make_recipe, predict, profile_sha256
from recompile.recipe.recipe import dump_recipe, load_recipe, parse_recipe
from tests import tiny
from tests.profiles import make_profile


def chosen_bits(choice: Choice) -> int:
    header = choice.profile.header
    return header.fixed_bits + sum(group.bits[choice.solution.choice[group.name]] for group in header.groups)


# ---- the file says what was chosen -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    level=st.sampled_from(LEVELS),
    layers=st.integers(1, 12),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    solver=st.sampled_from(["greedy", "exact"]),
    context=st.sampled_from(["clean", "base"]),
    known=st.booleans(),
)
def test_the_recipe_read_back_is_the_choice(
    level: str, layers: int, seed: int, share: float, solver: str, context: str, known: bool
) -> None:
    profile = make_profile(level, layers, seed, context=context)
    bpw = 2.1 + share * 3.7
    choice = choose(profile, Budget(bpw=bpw), solver)
    others = ["model.layers.0.input_layernorm.weight", "lm_head.weight", "model.embed_tokens.weight"]
    modules = [module for group in profile.header.groups for module in group.modules]
    names = [f"{module}.weight_packed" for module in modules] + others
    recipe, comments = make_recipe(choice, {"made_by": "tests"}, names if known else None)
    text = dump_recipe(recipe, comments, "heading")
    again = parse_recipe(text)
    assert again.warnings == ()
    assert again.unmatched(names) == []
    assert again.shadowed(names) == []
    assert len(again.overrides) <= len(modules)
    directory = {candidate.label: candidate.model_dir for candidate in profile.header.candidates}
    for group in profile.header.groups:
        label = choice.solution.choice[group.name]
        wanted = None if label == profile.header.base else directory[label]
        for module in group.modules:
            for part in ("weight", "weight_packed", "weight_scale", "trellis", "bias"):
                assert again.source_dir(f"{module}.{part}") == wanted
    for other in others:
        assert again.source_dir(other) is None
    assert choice.bits == chosen_bits(choice) <= bpw * profile.counted_weights + 1e-6
    assert choice.bpw <= bpw + 1e-12


@pytest.mark.parametrize(
    "ids", [(2, 3, 4), ("two", "three", "four"), (2, "3", 3.5), ("4", 4, "x: y"), (True, 1.5, "on")]
)
def test_ids_of_any_kind_come_back_as_they_were(ids: Sequence[object]) -> None:
    profile = make_profile(directories=dict(zip(ids, ("./a", "./b", "./c"), strict=True)))
    bits = [sum(group.bits[c.label] for group in profile.header.groups) for c in profile.header.candidates]
    for number, label in enumerate(candidate.label for candidate in profile.header.candidates):
        pins = [Constraint("pin", "*", label)]
        choice = choose(profile, Budget(bpw=(bits[number] + 3000) / profile.counted_weights), "exact", pins)
        recipe, comments = make_recipe(choice, {})
        again = parse_recipe(dump_recipe(recipe, comments))
        wanted = None if number == 1 else ("./a", "./b", "./c")[number]
        assert again.source_dir("model.layers.1.mlp.up_proj.weight") == wanted
        assert [type(source.id) for source in again.sources] == ([] if wanted is None else [type(ids[number])])


def test_every_line_says_what_it_saves_and_costs() -> None:
    profile = make_profile("fused")
    choice = choose(profile, Budget(bpw=3.5))
    recipe, comments = make_recipe(choice, {"made_by": "tests"})
    text = dump_recipe(recipe, comments, "two\nlines")
    assert text.startswith("# two\n# lines\n")
    lines = [line for line in text.splitlines() if line.startswith("  - {key: ")]
    assert len(lines) == len(recipe.overrides) > 3
    for group in profile.header.groups:
        label = choice.solution.choice[group.name]
        found = [line for line in lines if any(f'"{module}.*"' in line for module in group.modules)]
        if label == profile.header.base:
            assert found == []
            continue
        there, here = profile.cost(group.name, label), profile.cost(group.name, profile.header.base)
        assert there is not None
        assert here is not None
        bits = (group.bits[label] - group.bits[profile.header.base]) / 1e6
        assert found[0].endswith(f"# KL {there.kl_nats - here.kl_nats:+.6f}, {bits:+.3f} Mbit")
        assert all("# same group" in line for line in found[1:])
        assert len(found) == len(group.modules)
    again = parse_recipe(text)
    assert again.provenance["made_by"] == "tests"
    assert again.provenance["bpw"] == pytest.approx(choice.bpw, abs=1e-5)
    assert again.provenance["total_bytes"] == choice.total_bytes
    assert again.provenance["predicted_kl_nats"] == pytest.approx(choice.predicted_kl_nats, abs=1e-6)
    assert again.provenance["profile"]["sources"] == {c.label: c.fingerprint for c in profile.header.candidates}
    assert again.base == "./3bpw"
    assert again.budget == "3.5 bpw over quantized modules"


def test_globs_say_how_many_modules_they_decide_and_what_these_save_together() -> None:
    profile = make_profile("tensor", 6)
    pins = [Constraint("pin", "*.v_proj", "6"), Constraint("pin", "model.layers.2.self_attn.v_proj", "6")]
    choice = choose(profile, Budget(bpw=3.9), "exact", pins)
    modules = [module for group in profile.header.groups for module in group.modules]
    recipe, comments = make_recipe(choice, {}, [f"{module}.weight" for module in modules])
    assert len(recipe.overrides) < sum(source != "3" for source in choice.solution.choice.values())
    key = "model.layers.*.self_attn.v_proj.*"
    assert key in comments
    found = [(profile.cost(m, "6"), profile.cost(m, "3")) for m in modules if m.endswith("v_proj")]
    saved = math.fsum(there.kl_nats - here.kl_nats for there, here in found if there is not None and here is not None)
    bits = sum(g.bits["6"] - g.bits["3"] for g in profile.header.groups if g.name.endswith("v_proj"))
    assert comments[key] == f"6 modules, KL {saved:+.6f}, {bits / 1e6:+.3f} Mbit"


def test_the_hash_of_a_profile_changes_with_every_figure() -> None:
    profile = make_profile()
    hashes = {profile_sha256(profile), profile_sha256(make_profile(seed=1)), profile_sha256(make_profile(rows=5))}
    assert len(hashes) == 3
    (key, measurement), *_ = profile.measurements.items()
    other = dataclasses.replace(measurement, kl_rows=(*measurement.kl_rows[:-1], measurement.kl_rows[-1] + 1e-9))
    changed = dataclasses.replace(profile, measurements={**profile.measurements, key: other})
    assert profile_sha256(changed) not in hashes
    again = dataclasses.replace(profile, measurements=dict(reversed(profile.measurements.items())))
    assert profile_sha256(again) == profile_sha256(profile)


def test_lines_are_sorted_by_layer() -> None:
    recipe, _ = make_recipe(choose(make_profile("tensor", 12), Budget(bpw=4.5)), {})
    layers = [layer_index(override.key) for override in recipe.overrides]
    assert layers == sorted(layers, key=lambda layer: layer if layer is not None else math.inf)
    assert {source.id for source in recipe.sources} == {override.source for override in recipe.overrides}


def test_on_real_checkpoints_it_resolves_and_weighs_as_predicted(tmp_path: Path) -> None:
    """The header's sizes, the solver's sum, the overlay's accounting and the files agree to the bit."""
    import torch

    from eval.profile.exact import ProfileJob, ProfileOptions

    found = tiny.variants("llama", (2, 3, 4, 6))
    checkpoints = [(n, open_checkpoint(path)) for n, path in found.items()]
    options = ProfileOptions(level="fused", skip=("model.layers.3.*",))
    base = open_checkpoint(tiny.base("llama"))
    header = ProfileJob(base, 3, checkpoints, tiny.rows(2, 8), tmp_path, options).header(torch.float32)
    measurements = {
        (group.name, label): Measurement(group.name, label, (0.1 / bits, 0.2 / bits))
        for group in header.groups
        for label, bits in group.bits.items()
    }
    profile = Profile(header, Measurement(None, None, (0.0, 0.0)), measurements)
    for budget in (Budget(bpw=3.9), Budget(total_bpw=6.5), Budget(size_bytes=160_000)):
        choice = choose(profile, budget)
        recipe, comments = make_recipe(choice, {})
        path = tmp_path / "mix.yaml"
        path.write_text(dump_recipe(recipe, comments))
        overlay = build_overlay(checkpoints[1][1], load_recipe(path))
        size = overlay.accounting
        assert size.quantized_bits == choice.bits
        assert size.quantized_weights == profile.counted_weights
        assert size.bpw == choice.bpw
        assert size.total_bytes == choice.total_bytes
        assert overlay.overridden > 0
        if budget.bpw is not None:
            assert size.bpw <= 3.9
        elif budget.total_bpw is not None:
            assert 6.2 < size.total_bpw <= 6.5
        else:
            assert 150_000 < size.total_bytes <= 160_000


# ---- budgets ---------------------------------------------------------------------------------------------------------


def reachable(profile: Profile) -> tuple[int, int]:
    groups = profile.header.groups
    fewest, most = (sum(pick(group.bits.values()) for group in groups) for pick in (min, max))
    return fewest + profile.header.fixed_bits, most + profile.header.fixed_bits


def test_budgets_in_three_spellings_mean_the_same_bits() -> None:
    profile = make_profile()
    header = profile.header
    bits = 40 * header.group_weights // 10 + header.fixed_bits
    everything = profile.counted_weights + header.other_weights
    budgets = (
        Budget(bpw=bits / profile.counted_weights),
        Budget(total_bpw=(bits + header.other_bits) / everything),
        Budget(size_bytes=(bits + header.other_bits) // 8),
    )
    assert [budget.bits(profile) for budget in budgets] == pytest.approx([bits] * 3, abs=8)  # whole bytes in the last
    assert len({tuple(choose(profile, budget).solution.choice.items()) for budget in budgets}) == 1


@pytest.mark.parametrize("solver", ["greedy", "exact"])
def test_the_ends_of_the_range_are_reached_exactly(solver: str) -> None:
    profile = make_profile()
    for bits, label in zip(reachable(profile), ("2", "6"), strict=True):
        choice = choose(profile, Budget(bpw=bits / profile.counted_weights), solver)
        assert choice.bits <= bits
        if label == "2":
            assert set(choice.solution.choice.values()) == {"2"}
            assert choice.bits == bits


@pytest.mark.parametrize("kind", ["bpw", "total_bpw", "size_bytes"])
def test_a_budget_out_of_reach_says_the_range_and_the_range_is_true(kind: str) -> None:
    profile = make_profile()
    for value, says in (
        (0.001, "below what the cheapest sources take"),
        (1000.0, "above what the most expensive sources take"),
    ):
        budget = Budget(**{kind: int(value * 1e6) if kind == "size_bytes" else value})
        with pytest.raises(BudgetError, match=f"budget {re.escape(budget.describe())} is {says}") as caught:
            choose(profile, budget)
        found = re.search(r"reachable range: ([\d.]+) (\w+).* to ([\d.]+) (\w+)", str(caught.value))
        assert found, str(caught.value)
        unit = {"bpw": "bpw", "total_bpw": "bpw", "size_bytes": "bytes"}[kind]
        assert found[2] == found[4] == unit
        for end in (found[1], found[3]):  # what the message offers is accepted, digit for digit
            choose(profile, Budget(**{kind: int(end) if kind == "size_bytes" else float(end)}))


def test_a_range_of_one_size_can_be_asked_for() -> None:
    profile = make_profile()
    pins = [Constraint("pin", "*", "4")]
    with pytest.raises(BudgetError) as caught:
        choose(profile, Budget(bpw=1), "exact", pins)
    found = re.search(r"reachable range: ([\d.]+) bpw to ([\d.]+) bpw under these constraints", str(caught.value))
    assert found
    assert found[1] == found[2]
    choose(profile, Budget(bpw=float(found[1])), "exact", pins)


def test_constraints_narrow_the_range_and_the_message_says_so() -> None:
    with pytest.raises(BudgetError, match="under these constraints"):
        choose(make_profile(), Budget(bpw=2.5), "greedy", [Constraint("min", "*", "3")])


# ---- constraints -----------------------------------------------------------------------------------------------------


def test_constraints_are_kept() -> None:
    profile = make_profile("fused", 4)
    constraints = [
        Constraint.parse("pin", "*.down_proj=6"),
        Constraint.parse("min", "model.layers.0.*=4"),
        Constraint.parse("max", "model.layers.1.self_attn.o_proj=3"),
        Constraint.parse("pin", "model.layers.2.mlp.up_proj = 2"),
    ]
    for solver in ("greedy", "exact"):
        chosen = choose(profile, Budget(bpw=4.2), solver, constraints).solution.choice
        assert all(chosen[f"model.layers.{n}.mlp.down_proj"] == "6" for n in range(4))
        assert all(source in ("4", "6") for name, source in chosen.items() if ".0." in name)
        assert chosen["model.layers.1.self_attn.o_proj"] in ("2", "3")
        assert chosen["model.layers.2.mlp.gate_proj+up_proj"] == "2", "a group follows if any of its modules is named"


def test_constraints_name_modules_or_tensors() -> None:
    profile = make_profile("layer")
    for glob in ("model.layers.1.mlp.up_proj", "model.layers.1.*", "*.1.mlp.up_proj.weight"):
        chosen = choose(profile, Budget(bpw=3.5), "exact", [Constraint("pin", glob, "2")]).solution.choice
        assert chosen["model.layers.1"] == "2"


def test_constraints_that_exclude_each_other_are_refused() -> None:
    for one, other, says in (("min", "pin", "pin .*o_proj"), ("max", "min", "min .*o_proj|max .*o_proj")):
        baselines = [Constraint(one, "*.o_proj", "4"), Constraint(other, "*.o_proj", "2" if other == "pin" else "6")]
        with pytest.raises(RecompileError, match=says):
            choose(make_profile(), Budget(bpw=4), "greedy", baselines)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (("pin", "*.dwon_proj", "6"), r'pin "\*\.dwon_proj" matches no profiled module'),
        (
            ("pin", "layers.1.mlp.up_proj", "6"),
            r'matches no profiled module; did you mean "\*\.layers\.1\.mlp\.up_proj"',
        ),
        (("min", "*.down_proj", "5"), r'does not offer source "5"'),
        (("max", "*.down_proj", "6bpw"), r'does not offer source "6bpw"'),
    ],
)
def test_constraints_that_mean_nothing_are_refused(constraint: tuple[str, str, str], says: str) -> None:
    with pytest.raises(RecompileError, match=says):
        choose(make_profile(), Budget(bpw=4), "greedy", [Constraint(*constraint)])


@pytest.mark.parametrize("text", ["*.down_proj", "=4", "*.down_proj=", ""])
def test_constraints_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RecompileError, match=f'pin "{re.escape(text)}": wanted GLOB=ID'):
        Constraint.parse("pin", text)


# ---- what cannot be solved -------------------------------------------------------------------------------------------


def test_an_unfinished_profile_is_refused() -> None:
    profile = make_profile()
    (gone, source), *_ = profile.measurements
    short = dataclasses.replace(
        profile, measurements={key: m for key, m in profile.measurements.items() if key != (gone, source)}
    )
    with pytest.raises(
        RecompileError, match=rf"unfinished: 1 swaps are not measured, first {re.escape(gone)} from {source}"
    ):
        choose(short, Budget(bpw=4))


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(RecompileError, match='solver "magic": wanted one of greedy, exact'):
        choose(make_profile(), Budget(bpw=4), "magic")


# ---- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["clean", "base"])
def test_predictions_add_swaps_up_row_by_row(context: str) -> None:
    profile = make_profile(context=context)
    choice = choose(profile, Budget(bpw=3.7))
    assert profile.control is not None
    totals = list(profile.control.kl_rows)
    for group, source in choice.solution.choice.items():
        found = profile.measurements.get((group, source))
        if found is not None:
            for row, (value, zero) in enumerate(zip(found.kl_rows, profile.control.kl_rows, strict=True)):
                totals[row] += value - zero
    mean = sum(totals) / len(totals)
    assert choice.predicted_kl_nats == pytest.approx(mean, rel=1e-12)
    spread = math.sqrt(sum((total - mean) ** 2 for total in totals) / (len(totals) - 1) / len(totals))
    assert choice.predicted_std_error == pytest.approx(spread, rel=1e-9)
    assert choice.predicted_kl_nats == pytest.approx(profile.control.mean + choice.solution.cost, rel=1e-9)


def test_one_row_has_no_error() -> None:
    profile = make_profile(rows=1)
    assert predict(profile, {group.name: "2" for group in profile.header.groups})[1] is None


def test_more_bits_never_predict_worse() -> None:
    profile = make_profile(layers=6)
    costs = [choose(profile, Budget(bpw=bpw), "exact").predicted_kl_nats for bpw in (2.5, 3.0, 3.5, 4.0, 5.0, 5.9)]
    assert costs == sorted(costs, reverse=True)
