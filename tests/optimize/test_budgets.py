"""Budgets of every kind: kept, hit from below, and refused with the limit that binds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.costs import Measurement, Profile, ProfileGroup
from recompile.errors import BudgetError, RecompileError
from recompile.optimize.budget import Budget, Pool, active_share, max_kl_for, parse_share, split_pool
from recompile.optimize.choose import Constraint, Rules, choose
from recompile.optimize.exact import solve_exact
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.limits import Row, solve_rows, step_rows
from recompile.optimize.problem import Group, Option, Problem
from tests.profiles import make_profile


def moe_profile(layers: int = 3, experts: int = 4) -> Profile:
    """Attention, routed experts and a shared expert; costs fall by 4 a bit."""
    dense = make_profile("tensor", 1)
    header = dense.header
    groups, measurements = [], {}
    for layer in range(layers):
        names = ["self_attn.q_proj", "mlp.shared_experts.up_proj"]
        names += [f"mlp.experts.{n}.up_proj" for n in range(experts)]
        for number, name in enumerate(names):
            module = f"model.layers.{layer}.{name}"
            group = ProfileGroup(module, (module,), 4096, {str(b): 4096 * b for b in (2, 3, 4, 6)}, layer)
            groups.append(group)
            expensive = 0.01 * (1 + layer) * (3 if number < 2 else 1 + 0.1 * number)
            for b in (2, 3, 4, 6):
                measurements[module, str(b)] = Measurement(module, str(b), (expensive * 4.0**-b,) * header.rows)
    return Profile(dataclasses.replace(header, groups=tuple(groups)), dense.control, measurements)


def bits_of(profile: Profile, choice: dict[str, str], part: str = "") -> int:
    return sum(g.bits[choice[g.name]] for g in profile.header.groups if part in g.name)


# ---- one size, in all spellings --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), share=st.floats(0, 1), solver=st.sampled_from(["greedy", "exact"]))
def test_a_budget_is_hit_from_below_within_one_smallest_step(seed: int, share: float, solver: str) -> None:
    """No single upgrade that would help still fits, so what is left is less than the smallest helpful step."""
    profile = make_profile("fused", 4, seed)
    low = sum(min(g.bits.values()) for g in profile.header.groups) + profile.header.fixed_bits
    high = sum(max(g.bits.values()) for g in profile.header.groups) + profile.header.fixed_bits
    budget = Budget(bpw=(low + share * (high - low)) / profile.counted_weights)
    found = choose(profile, budget, solver)
    left = budget.bits(profile) - found.bits
    assert left >= 0
    for group in profile.header.groups:
        now = found.solution.choice[group.name]
        cost = profile.cost(group.name, now)
        for label, bits in group.bits.items():
            other = profile.cost(group.name, label)
            assert other is not None
            assert cost is not None
            if bits - group.bits[now] <= left and bits > group.bits[now]:
                assert other.kl_nats >= cost.kl_nats - 1e-15


def test_exactly_one_size_or_limits_beside_it() -> None:
    for wrong in (
        {},
        {"bpw": 3.0, "size_bytes": 10},
        {"bpw": 3.0, "max_kl": 0.1},
        {"max_kl": 1, "max_ppl_increase": 0.1},
    ):
        with pytest.raises(RecompileError, match="give"):
            Budget(**wrong)
    Budget(bpw=3.0, active_bpw=3.0, pools=(Pool("gpu", ("*",), 10),))


# ---- a limit on KL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["clean", "base"])
@pytest.mark.parametrize("solver", ["greedy", "exact"])
def test_the_smallest_size_within_a_kl(solver: str, context: str) -> None:
    profile = make_profile("fused", 4, context=context)
    least = choose(profile, Budget(bpw=5.9), solver).predicted_kl_nats
    most = choose(profile, Budget(bpw=2.1), solver).predicted_kl_nats
    limit = (least * most) ** 0.5
    found = choose(profile, Budget(max_kl=limit), solver)
    assert found.predicted_kl_nats <= limit + 1e-12
    if solver == "exact":  # a bit less does not do
        smaller = choose(profile, Budget(bpw=(found.bits - 1) / profile.counted_weights), solver)
        assert smaller.predicted_kl_nats > limit
    with pytest.raises(BudgetError, match=r"reachable range: .* nats per token"):
        choose(profile, Budget(max_kl=least / 1e3 if context == "clean" else 1e-6), solver)


def test_perplexity_is_a_limit_on_kl() -> None:
    assert max_kl_for(0.02) == pytest.approx(math.log(1.02))
    assert Budget(max_ppl_increase=0.02).max_kl == pytest.approx(0.0198026, rel=1e-5)
    assert parse_share("2%") == parse_share(" 0.02 ") == 0.02
    for wrong in ("two", "", "-1", "2 percent"):
        with pytest.raises(RecompileError, match="wanted a share"):
            parse_share(wrong)
    with pytest.raises(BudgetError, match="wanted more than 0"):
        Budget(max_ppl_increase=0.0)


# ---- active bits -----------------------------------------------------------------------------------------------------


def test_active_bits_weigh_experts_by_how_many_a_token_uses() -> None:
    profile = moe_profile()
    share = Fraction(1, 4)
    found = choose(profile, Budget(active_bpw=3.5, active_share=share), "exact")
    choice = dict(found.solution.choice)
    routed = bits_of(profile, choice, ".experts.")
    others = bits_of(profile, choice) - routed
    header = profile.header
    weights = sum(g.weights * (share if ".experts." in g.name else 1) for g in header.groups) + header.fixed_weights
    active = (routed * share + others + header.fixed_bits) / weights
    assert 3.5 - 2 * 4096 / weights < active <= 3.5
    # the experts' bits are a quarter of the price: they get more than under a plain budget of as many bits
    plain = choose(profile, Budget(bpw=found.bpw), "exact")
    assert routed > bits_of(profile, dict(plain.solution.choice), ".experts.")
    with pytest.raises(BudgetError, match=r"active_bpw 1 binds: .* reachable range: 2\.0\d+ active bpw"):
        choose(profile, Budget(active_bpw=1.0, active_share=share), "exact")


def test_active_bits_beside_a_size() -> None:
    profile = moe_profile()
    share = Fraction(1, 4)
    size = choose(profile, Budget(bpw=4.0), "exact")
    both = choose(profile, Budget(bpw=4.0, active_bpw=3.2, active_share=share), "exact")
    assert both.bits <= size.solution.budget_bits
    assert both.predicted_kl_nats >= size.predicted_kl_nats
    alone = choose(profile, Budget(active_bpw=3.2, active_share=share), "exact")
    assert both.predicted_kl_nats >= alone.predicted_kl_nats - 1e-15


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8}, Fraction(1, 16)),
        ({"n_routed_experts": 160, "num_experts_per_tok": 6}, Fraction(3, 80)),
        ({"text_config": {"num_local_experts": 8, "num_experts_per_tok": 2}}, Fraction(1, 4)),
    ],
)
def test_the_share_of_experts_from_a_config(config: dict[str, object], share: Fraction) -> None:
    assert active_share(config) == share


def test_a_dense_config_has_no_experts() -> None:
    with pytest.raises(RecompileError, match="names no experts"):
        active_share({"hidden_size": 64})


def test_groups_that_mix_experts_and_others_cannot_be_weighed() -> None:
    profile = moe_profile(1)
    one = ProfileGroup("model.layers.0", tuple(g.name for g in profile.header.groups), 1, {"2": 2, "3": 3}, 0)
    header = dataclasses.replace(profile.header, groups=(one,))
    costs = {("model.layers.0", n): Measurement("model.layers.0", n, (0.1,) * header.rows) for n in ("2", "3")}
    with pytest.raises(RecompileError, match="holds routed experts and other modules"):
        choose(Profile(header, profile.control, costs), Budget(active_bpw=2.5), "exact")


# ---- pools -----------------------------------------------------------------------------------------------------------

GPU, CPU = ("*.self_attn.*", "*.shared_experts.*"), ("*.experts.*",)


def pools(gpu: int, cpu: int) -> tuple[Pool, Pool]:
    return Pool("gpu", GPU, gpu), Pool("cpu", CPU, cpu)


@pytest.mark.parametrize("solver", ["greedy", "exact"])
def test_two_pools_are_two_problems(solver: str) -> None:
    profile = moe_profile()
    gpu, cpu = 6 * 4096 * 4 // 8, 12 * 4096 * 5 // 16
    found = choose(profile, Budget(pools=pools(gpu, cpu)), solver)
    choice = dict(found.solution.choice)
    inside = {name: bits_of(profile, choice, ".experts.") for name in ("cpu",)}
    inside["gpu"] = bits_of(profile, choice) - inside["cpu"]
    for name, size in (("gpu", gpu), ("cpu", cpu)):
        assert 8 * size - 2 * 4096 < inside[name] <= 8 * size
    assert found.solution.gap == 0.0 or solver == "greedy"
    for part, bits in ((".experts.", inside["cpu"]), ("", found.bits)):
        alone = [g for g in profile.header.groups if part in g.name]
        cost = sum(profile.cost(g.name, choice[g.name]).kl_nats for g in alone)  # type: ignore[union-attr]
        assert cost >= 0
        assert bits > 0


def test_what_the_globs_name_besides_counts_in_its_pool() -> None:
    profile = moe_profile()
    plain = choose(profile, Budget(pools=pools(20_000, 20_000)), "exact")
    gpu, cpu = pools(20_000, 20_000)
    tighter = choose(profile, Budget(pools=(dataclasses.replace(gpu, other_bits=8 * 6000), cpu)), "exact")
    choice = dict(tighter.solution.choice)
    assert bits_of(profile, choice) - bits_of(profile, choice, ".experts.") <= 8 * 14_000
    assert tighter.predicted_kl_nats > plain.predicted_kl_nats


def test_pools_beside_one_size_for_all() -> None:
    profile = moe_profile()
    budget = Budget(bpw=3.0, pools=pools(6 * 4096 * 4 // 8, 12 * 4096 * 4 // 8))
    found = choose(profile, budget, "exact")
    assert found.bits <= budget.bits(profile)
    choice = dict(found.solution.choice)
    assert bits_of(profile, choice) - bits_of(profile, choice, ".experts.") <= 6 * 4096 * 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (pools(6 * 4096 * 2 // 8 - 1, 10**6), r"pool gpu binds: .* reachable range: 6144 bytes .* to 18432 bytes"),
        (pools(10**6, 100), r"pool cpu binds: .* reachable range: 12288 bytes"),
        ((Pool("gpu", ("*.self_attn.*",), 10**6),), r"shared_experts.* is in no pool and nothing else limits it"),
        ((*pools(10**6, 10**6), Pool("x", ("*.1.self_attn.*",), 10**6)), "is in two pools, gpu and x"),
        ((*pools(10**6, 10**6), Pool("x", ("*.slf_attn.*",), 10**6)), r"pool x: .* matches nothing; did you mean"),
        ((Pool("a", GPU, 1), Pool("a", CPU, 1)), 'two pools are called "a"'),
    ],
)
def test_pools_that_cannot_be(given: tuple[Pool, ...], says: str) -> None:
    with pytest.raises(RecompileError, match=says):
        choose(moe_profile(), Budget(pools=given), "exact")


def test_limits_that_are_met_alone_but_not_together_name_what_binds() -> None:
    profile = moe_profile()
    pins = Rules((Constraint("pin", "*.self_attn.*", "6"),))
    budget = Budget(bpw=2.1, pools=pools(10**6, 10**6))
    with pytest.raises(
        BudgetError, match=r"below what the cheapest sources take; reachable range.*under these constraints"
    ):
        choose(profile, budget, "exact", pins)
    steps = Rules((Constraint("pin", "model.layers.0.self_attn.q_proj", "6"),), max_step=0)
    with pytest.raises(BudgetError, match=r"pool gpu binds: .* reachable range beside the other limits"):
        choose(profile, Budget(pools=pools(6 * 4096 * 2 // 8 + 4096, 10**6)), "exact", steps)


def test_pools_are_read() -> None:
    assert split_pool("gpu=*.self_attn.*, *.shared_experts.*:3GiB") == ("gpu", GPU, "3GiB")
    for wrong in ("gpu", "gpu=*.x", "=*.x:3GiB", "gpu=:3GiB", "gpu=*.x,,*.y:3GiB"):
        with pytest.raises(RecompileError, match="wanted NAME=GLOB,GLOB:SIZE"):
            split_pool(wrong)


# ---- several rows against brute force --------------------------------------------------------------------------------


def brute_force(problem: Problem, rows: list[Row]) -> float | None:
    best = None
    for numbers in itertools.product(*(range(len(group.options)) for group in problem.groups)):
        if all(row.used(numbers) <= row.limit for row in rows):
            cost = math.fsum(g.options[n].cost for g, n in zip(problem.groups, numbers, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_several_rows_equal_brute_force(steps: bool, apart: bool) -> None:
    rng = random.Random(5)
    infeasible = solved = 0
    for _ in range(40):
        count = rng.randint(2, 5)
        groups = []
        for number in range(count):
            weights = rng.choice([64, 100, 1000])
            options = tuple(Option(str(b), weights * b, rng.uniform(0, 1e-3) * 4.0 ** (2 - b)) for b in (2, 3, 4, 6))
            groups.append(Group(f"g{number}", options))
        problem = Problem(tuple(groups))
        cut = rng.randint(1, count - 1)
        first = {g: tuple(o.bits for o in groups[g].options) for g in range(cut if apart else count)}
        second = {
            g: tuple(rng.choice([1, 3]) * o.bits for o in groups[g].options) if not apart else first_bits(groups[g])
            for g in range(cut, count)
        }
        rows = [Row("a", first, 0), Row("b", second, 0)]
        rows = [dataclasses.replace(r, limit=r.least + int(rng.uniform(-0.05, 0.9) * (r.most - r.least))) for r in rows]
        if steps:
            rung = {"2": 0, "3": 1, "4": 2, "6": 3}
            rows += step_rows(problem, [(n, n + 1) for n in range(count - 1)], rung, rng.randint(0, 2))
        wanted = brute_force(problem, rows)
        if wanted is None:
            infeasible += 1
            with pytest.raises(BudgetError, match=r"binds|exclude"):
                solve_rows(problem, rows, solve_exact)
            continue
        solved += 1
        found = solve_rows(problem, rows, solve_exact)
        assert found.cost == pytest.approx(wanted, rel=1e-9, abs=1e-15)
        assert found.gap <= 1e-9 * (found.cost + 1e-6)
        if apart and not steps:
            assert solve_rows(problem, rows, solve_greedy).cost >= wanted - 1e-15
    assert solved > 10
    assert infeasible > 0


def first_bits(group: Group) -> tuple[int, ...]:
    return tuple(option.bits for option in group.options)


# ---- steps between neighbours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2])
def test_neighbouring_layers_differ_by_few_rungs(step: int) -> None:
    profile = make_profile("tensor", 6, seed=3)
    found = choose(profile, Budget(bpw=3.7), "exact", Rules(max_step=step))
    ladder = ["2", "3", "4", "6"]
    choice = found.solution.choice
    for group in profile.header.groups:
        following = f"model.layers.{int(group.layer or 0) + 1}.{group.name.split('.', 3)[3]}"
        if following in choice:
            assert abs(ladder.index(choice[group.name]) - ladder.index(choice[following])) <= step
    assert found.bpw <= 3.7
    free = choose(profile, Budget(bpw=3.7), "exact")
    assert found.predicted_kl_nats >= free.predicted_kl_nats - 1e-12
    if step == 0:
        assert found.predicted_kl_nats > free.predicted_kl_nats


def test_steps_need_a_solver_that_knows_them() -> None:
    with pytest.raises(RecompileError, match="max_step needs solver exact"):
        choose(make_profile(), Budget(bpw=3.7), "greedy", Rules(max_step=1))
    with pytest.raises(RecompileError, match="wanted 0 or more"):
        choose(make_profile(), Budget(bpw=3.7), "exact", Rules(max_step=-1))
