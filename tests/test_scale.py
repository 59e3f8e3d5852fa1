"""Planning takes time that grows with the number of modules, and no faster. No clock: calls of functions are counted,
Python's and C's, while everything grows by the same step twice."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from recompile import costs
from recompile.checkpoint import checkpoint as checkpoint_module
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Measurement, Profile, ProfileHeader, open_journal
from recompile.merge.explain import resolved_table
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Rules, choose, make_recipe
from recompile.recipe.recipe import dump_recipe
from tests.profiles import make_profile
from tests.sparse import moe_checkpoint

MORE = 1.15  # a sort or a hash table costs a little more a module when there are more of them


def calls_of(action: Callable[[], object]) -> Counter[str]:
    """How often every function was called."""
    counts: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            counts[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            counts[getattr(argument, "__qualname__", "?")] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return counts


def assert_linear(run: Callable[[int], Counter[str]], sizes: tuple[int, int, int]) -> None:
    """Equal steps of size cost equal steps of calls, whatever is constant apart."""
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    few, some, many = (run(size) for size in sizes)
    first = sum(some.values()) - sum(few.values())
    second = sum(many.values()) - sum(some.values())
    grown = Counter({name: many[name] - 2 * some[name] + few[name] for name in many}).most_common(3)
    assert first > 0
    assert second <= MORE * first, f"{first} calls for a step, then {second}; most of it in {grown}"


def recipe_text(source: Path, experts: int, share: float) -> str:
    """A line for every layer's attention and for a part of the experts, each in one layer of its own."""
    draw = random.Random(1)
    lines = [f'  - {{key: "*.experts.{n}.*", source: 4}}' for n in range(experts) if draw.random() < share]
    lines += [f'  - {{key: "model.layers.{3 + n % 2}.mlp.experts.{n}.up_proj.*", source: 4}}' for n in range(experts)]
    return "\n".join(
        [f"sources: [{{id: 4, model_dir: {source}}}]", "overrides:", '  - {key: "*attn*", source: 4}', *lines]
    )


@pytest.mark.parametrize("grow", ["experts", "layers"])
@pytest.mark.parametrize("many_lines", [False, True], ids=["one line", "a line an expert"])
def test_a_dry_run_is_linear_in_the_modules(tmp_path: Path, grow: str, many_lines: bool) -> None:
    def run(size: int) -> Counter[str]:
        layers, experts = (5, size) if grow == "experts" else (3 + size // 8, 8)
        base, source = (moe_checkpoint(tmp_path / f"{size}-{bits}", layers, experts, bits) for bits in (3, 4))
        text = recipe_text(source, experts if many_lines else 0, 0.3)
        recipe = tmp_path / f"{size}.yaml"
        recipe.write_text(text)

        def plan() -> None:
            overlay = build_overlay(open_checkpoint(base), recipe)
            planned = plan_write(overlay, tmp_path / "out")
            assert len(planned.modules) == len(overlay.placements) > size
            assert "self_attn" in resolved_table(overlay)

        return calls_of(plan)

    assert_linear(run, (24, 48, 72))


@pytest.mark.parametrize("engine", [None, "vllm"])
def test_choosing_a_recipe_is_linear_in_the_groups(engine: str | None) -> None:
    def run(experts: int) -> Counter[str]:
        profile = make_profile("expert", layers=4, experts=experts)
        names = [f"{module}.weight" for group in profile.header.groups for module in group.modules]

        def choose_one() -> None:
            choice = choose(profile, Budget(bpw=3.5), "greedy", Rules(engine=engine))
            assert dump_recipe(*make_recipe(choice, {}, names)).count("key:") > 5

        return calls_of(choose_one)

    run(4)  # what is loaded late is loaded now
    assert_linear(run, (24, 48, 72))


def test_a_journal_builds_a_profile_only_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a copy of all measurements, so one an append would be quadratic in the swaps."""
    built: list[int] = []

    def counted(header: ProfileHeader, control: Measurement | None, measurements: Mapping[Any, Measurement]) -> Profile:
        built.append(len(measurements))
        return Profile(header, control, measurements)

    profile = make_profile("expert", layers=2, experts=4)
    measurements = list(profile.measurements.values())
    monkeypatch.setattr(costs, "Profile", counted)
    with open_journal(tmp_path / "p.jsonl", profile.header) as journal:
        empty = journal.profile
        for found in measurements[:-1]:
            journal.append([found])
        assert built == [0]
        before = journal.profile
        assert journal.profile is before
        journal.append(measurements[-1:])
        assert (len(empty.measurements), len(before.measurements)) == (0, len(measurements) - 1)  # as they were
        assert journal.profile.measurements == profile.measurements
    assert built == [0, len(measurements) - 1, len(measurements)]


def test_a_report_is_linear_in_the_groups(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from eval.report.data import gather
    from eval.report.page import render
    from eval.report.pictures import shown_choice, write_pictures

    def run(experts: int) -> Counter[str]:
        path = tmp_path / f"{experts}.jsonl"
        profile = make_profile("expert", layers=2, experts=experts)
        assert profile.control is not None
        with open_journal(path, profile.header) as journal:
            journal.append([profile.control, *profile.measurements.values()])

        def report() -> None:
            data = gather(path)
            assert len(shown_choice(data)) == len(profile.header.groups)
            assert "script" in render(data)
            write_pictures(data, tmp_path / f"{experts}", "svg")

        return calls_of(report)

    run(4)
    assert_linear(run, (12, 24, 36))


def test_many_small_reads_open_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = moe_checkpoint(tmp_path / "m", layers=5, experts=6, bits=4, shard_bytes=1 << 30)
    opened: Counter[str] = Counter()
    opens = checkpoint_module.os.open

    def note(path: str, *options: int) -> int:
        opened[Path(path).name] += 1
        return opens(path, *options)

    checkpoint = open_checkpoint(directory)
    monkeypatch.setattr(checkpoint_module.os, "open", note)
    assert sum(module.is_quantized for module in checkpoint.modules.values()) > 50
    assert len(opened) > 1
    assert set(opened.values()) == {1}
