"""The optimizers on measured tables of real models.

The tables and the recipe are by Thireus, the GGUF Tool Suite and its contributors; tests/data/thireus/README.md gives
the credit and the licence.

Cost model, plain and additive: one tensor at one type costs

    max(cell - floor, 0) * curve(type) / curve(row)       nats per token

where cell is the KL measured with this tensor alone at the row's type, floor the least cell of the row (the engine's
own noise), and curve the KL of the whole model at a type. Tensors add up. Both are simplifications (single swaps do
not quite add up, and all tensors need not share one curve): what is tested here is the choice, not the model. The
published recipe was made by another tool with another objective, and is priced in the same table.
"""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path

import pytest

from recompile.optimize.exact import solve_exact
from recompile.optimize.frontier import lagrangian_path
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import Group, Option, Problem, Solution, evaluate, reachable_range

DATA = Path(__file__).parents[1] / "data" / "thireus"
QWEN3_4B = DATA / "Qwen3-4B-Instruct-2507"
QWEN35_27B = DATA / "Qwen3.5-27B"
GLM_AIR = DATA / "GLM-4.5-Air"
GEMMA_31B = DATA / "gemma-4-31B-it"
LADDER = (
    "q8_0",
    "iq6_k",
    "iq5_k",
    "iq5_ks",
    "iq4_k",
    "iq4_ks",
    "iq4_kt",
    "iq3_k",
    "iq3_kt",
    "iq2_kl",
    "iq2_k",
    "iq2_kt",
)
NOT_MEASURED = 404.0


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_curve(path: Path) -> dict[str, float]:
    """type -> KL of the whole model at that type, nats per token."""
    curve = {row["QTYPE"]: float(row["group0"]) for row in read_rows(path)}
    return {name: kl for name, kl in curve.items() if kl != NOT_MEASURED}


def read_problem(folder: Path, curve_file: str, row_type: str, types: tuple[str, ...]) -> Problem:
    curve = read_curve(folder / curve_file)
    row = next(row for row in read_rows(folder / "kld_per_tensor.csv") if row["QTYPE"] == row_type)
    cells = {name: float(cell) for name, cell in row.items() if name != "QTYPE" and float(cell) != NOT_MEASURED}
    floor = min(cells.values())
    together = read_groups(folder / "groups_measured_together.txt")
    bits: dict[str, dict[str, int]] = {}  # what was measured as one -> type -> bits
    alone: dict[str, float] = {}
    fixed_bits = 0
    for tensor in read_rows(folder / "tensor_bytes.csv"):
        name = tensor["tensor"]
        if name not in cells:  # norms: float32 under every type; a few that nobody measured stay at the first type
            fixed_bits += 8 * int(tensor[types[0]])
            continue
        group = next((title for title, pattern in together if pattern.search(name)), name)
        found = bits.setdefault(group, dict.fromkeys(types, 0))
        for kind in types:
            found[kind] += 8 * int(tensor[kind])
        alone[group] = max(cells[name] - floor, 0.0)  # every member of a group carries the group's value
    groups = [
        Group(name, tuple(Option(kind, found[kind], alone[name] * curve[kind] / curve[row_type]) for kind in types))
        for name, found in bits.items()
    ]
    return Problem(tuple(groups), fixed_bits)


def read_groups(path: Path) -> list[tuple[str, re.Pattern[str]]]:
    """(title, pattern) of tensors that were dropped together, `group0:^regex$` a line; none where there is no file."""
    if not path.exists():
        return []
    return [(title, re.compile(rule)) for title, _, rule in (line.partition(":") for line in path.read_text().split())]


def read_recipe(path: Path, problem: Problem) -> dict[str, str]:
    """tensor -> type; the lines are `regex=type`, and the tool names every tensor by one line."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    rules = [line.rsplit("=", 1) for line in lines]
    return {
        group.name: next(kind for pattern, kind in rules if re.search(pattern, group.name)) for group in problem.groups
    }


def has_fitting_upgrade(problem: Problem, solution: Solution) -> bool:
    """Whether one group could still move to an option that costs less, within what is left of the budget."""
    left = solution.budget_bits - solution.bits
    for group in problem.groups:
        now = group.option(solution.choice[group.name])
        assert now is not None
        if any(option.cost < now.cost and option.bits - now.bits <= left for option in group.options):
            return True
    return False


@pytest.mark.parametrize("row_type", ["q2_k_r4", "iq1_kt"])
@pytest.mark.parametrize(
    ("types", "margin"),  # reached: 0.92 and 0.91 with the recipe's three types, 0.83 and 0.81 with all
    [(("q5_0", "iq4_kt", "iq3_kt"), 0.93), ((*LADDER, "q5_0"), 0.84)],
    ids=["its types", "all types"],
)
def test_no_dearer_than_the_published_recipe_at_no_more_bytes(
    row_type: str, types: tuple[str, ...], margin: float
) -> None:
    problem = read_problem(QWEN3_4B, "kld_whole_model_by_type.csv", row_type, types)
    assert len(problem.groups) == 253
    published_bits, published_cost = evaluate(problem, read_recipe(QWEN3_4B / "published_3.6081bpw.recipe", problem))
    assert published_bits / 8 / 2**30 == pytest.approx(1.69, abs=0.005)  # GiB, as the recipe's own footer says
    began = time.process_time()
    exact, greedy = solve_exact(problem, published_bits), solve_greedy(problem, published_bits)
    assert time.process_time() - began < 10  # 0.05 s on one core
    assert exact.gap == 0.0
    assert exact.cost <= greedy.cost <= margin * published_cost
    assert max(exact.bits, greedy.bits) <= published_bits


TABLES = {
    "Qwen3-4B": (QWEN3_4B, "kld_whole_model_by_type.csv", "q2_k_r4"),
    "Qwen3.5-27B": (QWEN35_27B, "kld_whole_model_by_type_measured_with_bpw.csv", "iq1_kt"),
    "GLM-4.5-Air": (GLM_AIR, "kld_whole_model_by_type_measured_with_bpw.csv", "iq1_m_r4"),
    "gemma-4-31B-it": (GEMMA_31B, "kld_whole_model_by_type_measured_with_bpw.csv", "iq2_xxs"),
}


@pytest.mark.parametrize("name", TABLES)
def test_exact_beats_uniform_types_hits_its_budget_and_bounds_greedy(name: str) -> None:
    problem = read_problem(*TABLES[name], LADDER)
    low, high = reachable_range(problem)
    path = lagrangian_path(problem)
    for kind in LADDER[1:-1]:
        uniform_bits, uniform_cost = evaluate(problem, {group.name: kind for group in problem.groups})
        assert low < uniform_bits < high
        began = time.process_time()
        exact = solve_exact(problem, uniform_bits)
        assert time.process_time() - began < 10
        greedy = solve_greedy(problem, uniform_bits)
        assert exact.gap == 0.0
        assert path.bound_at(uniform_bits) <= exact.cost * (1 + 1e-9)
        assert exact.cost <= greedy.cost <= exact.cost * 1.0005  # reached: 1.0003 at the worst
        assert exact.cost < 0.95 * uniform_cost  # reached: 0.31 to 0.92
        assert max(exact.bits, greedy.bits) <= uniform_bits
        assert not has_fitting_upgrade(problem, exact)
        assert not has_fitting_upgrade(problem, greedy)
        assert uniform_bits - exact.bits < 1e-4 * uniform_bits
