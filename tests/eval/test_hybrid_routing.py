"""The hybrid profile of a mixture of experts checks groups of experts where rounding sends tokens to other experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from eval.diff import DiffReport, compare
from eval.profile.exact import ProfileJob, ProfileOptions
from eval.profile.hybrid import (
    HybridOptions,
    HybridRound,
    RoutingMoved,
    noise_by_group,
    profile_hybrid,
    routing_moved,
    worth_checking,
)
from eval.profile.sketch import SketchOptions
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Profile, load_profile
from recompile.model.texts import default_text
from recompile.model.tokenizer import load_tokenizer
from recompile.model.tokens import make_rows
from recompile.optimize.choose import Budget
from recompile.quantize.lazy_variant import make_variants, spec_of
from tests import tiny

NOISE = 0.15


def test_expert_groups_are_checked_where_routing_moves(tiny_models: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tiny_models["tiny-moe"]
    base = open_checkpoint(folder)
    ids = make_rows(default_text(), load_tokenizer(folder), 2, 64, "choose").ids
    offered = make_variants(base, [spec_of(bits, group_size=32, symmetric=True) for bits in ("2", "3", "4")])
    job = ProfileJob(base, offered[1][0], offered, ids, tmp_path / "p.jsonl", ProfileOptions())
    hybrid = HybridOptions(Budget(bpw=3.2), minutes=0.02, least_gain_nats=0.0)
    events = list(profile_hybrid(job, SketchOptions(8), hybrid))
    profile = events[-1]
    assert isinstance(profile, Profile)
    (moved,) = (event for event in events if isinstance(event, RoutingMoved))
    *_, report = compare(offered[1][1], base, ids)
    assert isinstance(report, DiffReport)
    wanted = [1 - layer.same_experts.mean for layer in report.routing]
    assert [moved.by_layer[layer] for layer in sorted(moved.by_layer)] == pytest.approx(wanted, abs=1e-6)
    assert 0.02 < max(wanted) < 1
    assert any(isinstance(event, HybridRound) and event.swaps for event in events)

    groups = profile.header.groups
    experts = {group.name: group.layer for group in groups if any(".experts." in m for m in group.modules)}
    noises = noise_by_group(groups, NOISE, moved)
    for group in groups:
        extra = moved.by_layer.get(group.layer, 0.0) if group.name in experts and group.layer is not None else 0.0
        assert noises[group.name] ** 2 == pytest.approx(NOISE**2 + extra**2)
    sketched = load_profile(job.path)
    before, after = (
        [name for name, _ in worth_checking(sketched, hybrid.budget, found, set())[0]]
        for found in (noise_by_group(groups, NOISE, None), noises)
    )
    assert set(before) <= set(after)

    def mean_place(order: list[str]) -> float:
        places = [place for place, name in enumerate(order) if name in experts]
        return sum(places) / len(places) / len(order)

    assert mean_place(after) < mean_place(before)


def test_a_dense_model_is_not_run_for_routing(tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base("llama"))
    offered = make_variants(base, [spec_of(bits, group_size=32, symmetric=True) for bits in ("3", "4")])
    job = ProfileJob(base, offered[0][0], offered, tiny.rows(2, 16), tmp_path / "p.jsonl", ProfileOptions())
    header = job.header(job.model().dtype, method="hybrid", settings={})
    assert routing_moved(job, Profile(header, None, {})) is None
    assert set(noise_by_group(header.groups, NOISE, None).values()) == {NOISE}
