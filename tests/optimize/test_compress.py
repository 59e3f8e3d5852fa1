"""Compressed recipes say exactly what was chosen, for any model, and are as short as a person would write them."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.recipe.compress import Line, compress, plain_lines
from recompile.recipe.recipe import Override, Recipe, Source, dump_recipe, parse_recipe

PARTS = ("weight", "weight_packed", "weight_scale", "bias", "trellis")
DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
MOE = ("self_attn.q_proj", *(f"mlp.experts.{n}.{p}_proj" for n in (0, 1, 11) for p in ("up", "down")), "mlp.shared.up")


def modules_of(kinds: tuple[str, ...], layers: int) -> list[str]:
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def norms_of(layers: int) -> list[str]:
    return [
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{n}.{name}.weight" for n in range(layers) for name in ("input_layernorm", "self_attn.q_norm")),
    ]


def recipe_of(lines: tuple[Line, ...]) -> Recipe:
    sources = tuple(Source(line.directory, line.directory) for line in lines)
    sources = tuple({source.id: source for source in sources}.values())
    made = Recipe(sources, tuple(Override(line.key, line.directory) for line in lines))
    return parse_recipe(dump_recipe(made))


def check(assignment: dict[str, str | None], others: list[str] | None) -> tuple[Line, ...]:
    """Every name resolves as assigned; every line decides what it says, and something."""
    lines = compress(assignment, others)
    recipe = recipe_of(lines)
    deciders: dict[str, list[str]] = {}
    for module, directory in assignment.items():
        for part in PARTS:
            assert recipe.source_dir(f"{module}.{part}") == directory, (module, lines)
        override = recipe.explain(f"{module}.weight").override
        if override is not None:
            deciders.setdefault(override.key, []).append(module)
    assert {line.key: sorted(line.modules) for line in lines} == {k: sorted(v) for k, v in deciders.items()}
    assert all(line.modules for line in lines)
    for name in others or ():
        assert recipe.source_dir(name) is None
    assert len(lines) <= len(plain_lines(assignment))
    return lines


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.sampled_from([DENSE, MOE]),
    layers=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    order=st.floats(0, 1),
    directories=st.integers(1, 5),
    known=st.booleans(),
    left_out=st.booleans(),
)
def test_the_reader_resolves_to_the_assignment(
    kinds: tuple[str, ...], layers: int, seed: int, order: float, directories: int, known: bool, left_out: bool
) -> None:
    """order: how far the choice follows the kind of module; left_out: some modules are not offered and must stay."""
    rng = random.Random(seed)
    places: list[str | None] = [None, *(f"./{bits}bpw" for bits in (2, 3, 4, 6, 8)[:directories])]
    of_kind = {kind: rng.choice(places) for kind in kinds}
    modules = modules_of(kinds, layers)
    stay = [module for module in modules if left_out and rng.random() < 0.1]
    assignment = {
        f"model.layers.{layer}.{kind}": of_kind[kind] if rng.random() < order else rng.choice(places)
        for layer in range(layers)
        for kind in kinds
        if f"model.layers.{layer}.{kind}" not in stay
    }
    others = [f"{module}.weight" for module in modules] + norms_of(layers) if known else None
    if others is not None:
        for name in norms_of(layers) + [f"{module}.weight" for module in stay]:
            assert name in others
    lines = compress(assignment, others)
    recipe = recipe_of(lines)
    for module, directory in assignment.items():
        for part in PARTS:
            assert recipe.source_dir(f"{module}.{part}") == directory
    for name in norms_of(layers) + [f"{module}.weight" for module in stay]:
        assert recipe.source_dir(name) is None
    check(assignment, norms_of(layers) + [f"{module}.weight" for module in stay] if known else None)


def test_a_rule_with_exceptions_is_a_rule_and_its_exceptions_last() -> None:
    assignment: dict[str, str | None] = dict.fromkeys(modules_of(DENSE, 12), "./3bpw")
    for layer in range(12):
        assignment[f"model.layers.{layer}.self_attn.v_proj"] = "./4bpw"
    assignment["model.layers.0.self_attn.v_proj"] = "./6bpw"
    assignment["model.layers.11.mlp.down_proj"] = "./6bpw"
    lines = check(assignment, norms_of(12))
    assert [(line.key, line.directory, len(line.modules)) for line in lines] == [
        ("model.layers.*.mlp.*", "./3bpw", 23),
        ("model.layers.*.self_attn.k_proj.*", "./3bpw", 12),
        ("model.layers.*.self_attn.o_proj.*", "./3bpw", 12),
        ("model.layers.*.self_attn.q_proj.*", "./3bpw", 12),
        ("model.layers.*.self_attn.v_proj.*", "./4bpw", 11),
        ("model.layers.0.self_attn.v_proj.*", "./6bpw", 1),
        ("model.layers.11.mlp.down_proj.*", "./6bpw", 1),
    ]


def test_what_stays_with_the_base_is_never_matched() -> None:
    """down_proj of layer 2 was not offered: a star over the layers would take it along."""
    offered = [module for module in modules_of(("mlp.down_proj",), 5) if ".2." not in module]
    lines = check(dict.fromkeys(offered, "./4bpw"), ["model.layers.2.mlp.down_proj.weight"])
    assert [line.key for line in lines] == [f"model.layers.{n}.mlp.down_proj.*" for n in (0, 1, 3, 4)]
    assert len(check(dict.fromkeys(offered, "./4bpw"), ["model.layers.2.mlp.up_proj.weight"])) == 1


def test_without_the_other_names_every_module_has_a_line() -> None:
    modules = modules_of(DENSE, 12)
    lines = compress(dict.fromkeys(modules, "./4bpw"), None)
    assert [line.modules for line in lines] == [(module,) for module in sorted(modules, key=natural)]


def natural(module: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in module.split(".")]


def test_experts_of_a_layer_are_one_line() -> None:
    modules = [f"model.layers.{n}.mlp.experts.{e}.{p}" for n in range(3) for e in range(20) for p in ("up", "down")]
    assignment: dict[str, str | None] = dict.fromkeys(modules, "./2bpw")
    assignment |= dict.fromkeys((m for m in modules if m.startswith("model.layers.1.")), "./4bpw")
    lines = check(assignment, [f"model.layers.{n}.mlp.gate.weight" for n in range(3)])
    assert [line.key for line in lines] == ["model.layers.*.mlp.experts.*", "model.layers.1.mlp.experts.*"]


def test_nothing_taken_is_no_line() -> None:
    assert compress(dict.fromkeys(modules_of(DENSE, 2)), []) == ()
    assert compress({}, None) == ()


def test_thousands_of_experts_take_seconds() -> None:
    rng = random.Random(5)
    modules = [f"model.layers.{n}.mlp.experts.{e}.{p}" for n in range(20) for e in range(64) for p in ("u", "g", "d")]
    assignment: dict[str, str | None] = {module: rng.choice(("./2bpw", "./3bpw", "./3bpw", None)) for module in modules}
    began = time.process_time()
    lines = compress(assignment, [])
    assert time.process_time() - began < 30  # about 1 s on one core
    assert sum(len(line.modules) for line in lines) == sum(place is not None for place in assignment.values())
