"""What an engine fuses stays together, and what it cannot run is not chosen."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from eval.profile.exact import ProfileJob, ProfileOptions
from eval.search.optimize import OptimizeOptions, rules_of, say_of_experts
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Measurement, Profile
from recompile.errors import RecompileError
from recompile.events import Note
from recompile.optimize.choose import Budget, Constraint, Rules, choose
from recompile.optimize.engine_constraints import ENGINES, check_engine, loaded_together, refusals, why_refused
from tests import tiny


def profile_of(architecture: str, bits: tuple[int, ...], level: str = "tensor") -> Profile:
    """Costs that differ widely from module to module, so that an unconstrained choice splits every set."""
    found = tiny.variants(architecture, bits)
    checkpoints = [(n, open_checkpoint(path)) for n, path in found.items()]
    reference = open_checkpoint(tiny.base(architecture))
    options = ProfileOptions(level=level)
    header = ProfileJob(reference, bits[0], checkpoints, tiny.rows(2, 8), Path(), options).header(torch.float32)
    measurements = {}
    for number, group in enumerate(header.groups):
        expensive = 10.0 ** -((7 * number) % 5)
        for label in group.bits:
            kl = expensive * 4.0 ** -int(label)
            measurements[group.name, label] = Measurement(group.name, label, (kl, kl))
    return Profile(header, Measurement(None, None, (0.0, 0.0)), measurements)


def sources_of(profile: Profile, choice: dict[str, str]) -> dict[str, str]:
    return {module: choice[group.name] for group in profile.header.groups for module in group.modules}


def choose_for(profile: Profile, engine: str | None) -> dict[str, str]:
    found = choose(profile, Budget(bpw=3.8), "exact", Rules(engine=engine))
    assert found.bpw <= 3.8
    return sources_of(profile, dict(found.solution.choice))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_moe_is_kept_together_as_the_engine_needs_it(engine: str) -> None:
    profile = profile_of("qwen2-moe", (2, 3, 4, 6))
    free = choose_for(profile, None)
    chosen = choose_for(profile, engine)
    sets: dict[str, set[str]] = defaultdict(set)
    free_sets: dict[str, set[str]] = defaultdict(set)
    for module, source in chosen.items():
        layer = module.split(".")[2]
        leaf = module.rpartition(".")[2]
        if ".experts." in module:
            key = {"vllm": layer, "sglang": layer, "transformers": "all"}.get(engine, f"{layer} {leaf}")
        elif engine in ("vllm", "sglang") and leaf != "o_proj" and leaf != "down_proj":
            key = f"{module.rpartition('.')[0]} {'qkv' if leaf in ('q_proj', 'k_proj', 'v_proj') else 'gate_up'}"
        else:
            key = module
        sets[key].add(source)
        free_sets[key].add(free[module])
    assert all(len(found) == 1 for found in sets.values())
    assert any(len(found) > 1 for found in free_sets.values()), "the engine's rule has to change something here"
    assert len({source for found in sets.values() for source in found}) > 1


def test_fused_groups_of_a_profile_are_merged_further_where_the_engine_asks_it() -> None:
    profile = profile_of("qwen2-moe", (2, 4), "fused")
    chosen = choose_for_bits(profile, "vllm", 3.0)
    for layer in ("0", "1"):
        assert len({s for m, s in chosen.items() if f".{layer}.mlp.experts." in m}) == 1


def test_experts_of_a_layer_share_a_source_unless_they_are_free() -> None:
    """Without --engine too: a mix of experts is loaded by hardly anything."""
    profile = profile_of("qwen2-moe", (2, 3, 4, 6))
    sources = {label: open_checkpoint(path) for label, path in tiny_paths("qwen2-moe", (2, 3, 4, 6)).items()}
    for free in (False, True):
        rules = rules_of(OptimizeOptions(free_experts=free), sources)
        chosen = sources_of(profile, dict(choose(profile, Budget(bpw=3.8), "exact", rules).solution.choice))
        layers = [{s for m, s in chosen.items() if f".{n}.mlp.experts." in m} for n in range(2)]
        assert all(len(found) == 1 for found in layers) is not free
        qkv = {s for m, s in chosen.items() if m.startswith("model.layers.0.self_attn.") and not m.endswith("o_proj")}
        assert len(qkv) > 1, "what transformers loads one by one may differ"
        told: list[Note] = []
        say_of_experts(rules, profile, told.append)  # type: ignore[arg-type]
        assert [note.text.split(" ")[0] for note in told] == ([] if free else ["24"])
    assert rules_of(OptimizeOptions(engine="transformers"), None).experts_of is None


def tiny_paths(architecture: str, bits: tuple[int, ...]) -> dict[str, Path]:
    return {str(n): path for n, path in tiny.variants(architecture, bits).items()}


def choose_for_bits(profile: Profile, engine: str, bpw: float) -> dict[str, str]:
    return sources_of(profile, dict(choose(profile, Budget(bpw=bpw), "exact", Rules(engine=engine)).solution.choice))


def test_sets_of_a_dense_layer() -> None:
    names = [f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.up")]
    names += ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_a_proj", "lm_head"]
    names += ["model.layers.1.self_attn.kv_a_proj_with_mqa", "model.layers.1.self_attn.q_b_proj"]
    assert loaded_together("vllm", names) == [
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"),
        ("model.layers.1.self_attn.q_a_proj", "model.layers.1.self_attn.kv_a_proj_with_mqa"),
    ]
    assert loaded_together("exllamav3", names) == []


def test_what_the_engine_refuses_is_told_from_the_files() -> None:
    checkpoints = {str(n): open_checkpoint(path) for n, path in tiny.variants("llama", (3, 4)).items()}
    module = checkpoints["4"].modules["model.layers.0.mlp.down_proj"]
    for engine in ("vllm", "transformers", "llama.cpp"):
        assert why_refused(engine, checkpoints["4"], module) is None
        assert refusals(engine, checkpoints) == {"3": {}, "4": {}}
    assert why_refused("exllamav3", checkpoints["4"], module) == "exllamav3 does not read pack-quantized"
    refused = refusals("exllamav3", checkpoints)["3"]
    assert "model.layers.0.mlp.down_proj" in refused
    assert "model.norm" not in refused, "dense modules are read by all"


def test_what_the_engine_refuses_is_not_chosen() -> None:
    profile = profile_of("llama", (2, 3, 4))
    modules = [module for group in profile.header.groups for module in group.modules]
    refused = {"2": dict.fromkeys(modules, "no kernel for 2 bits"), "3": {modules[0]: "no kernel for it"}}
    choice = choose(profile, Budget(bpw=4.2), "exact", Rules(engine="llama.cpp", refused=refused)).solution.choice
    assert "2" not in choice.values()
    assert "3" in choice.values()
    assert sources_of(profile, dict(choice))[modules[0]] == "4"
    refused["3"] = refused["4"] = dict.fromkeys(modules, "does not read it")
    with pytest.raises(RecompileError, match=r"engine vllm: .*does not read it.*: leaves \"model.layers.0"):
        choose(profile, Budget(bpw=3.8), "exact", Rules(engine="vllm", refused=refused))


def test_an_engine_that_nobody_knows() -> None:
    with pytest.raises(RecompileError, match='engine "tgi": wanted one of vllm'):
        check_engine("tgi")


# ---- ties and bans -----------------------------------------------------------------------------------------------


def test_tied_modules_share_a_source_and_a_pin_of_one_is_a_pin_of_all() -> None:
    profile = profile_of("llama", (2, 3, 4, 6))
    rules = Rules(
        (Constraint("pin", "model.layers.1.mlp.down_proj", "4"),), ("*.down_proj", "*.[qk]_proj", "*.q_proj")[::2]
    )
    chosen = sources_of(profile, dict(choose(profile, Budget(bpw=3.8), "exact", rules).solution.choice))
    assert {source for module, source in chosen.items() if module.endswith("down_proj")} == {"4"}
    assert len({source for module, source in chosen.items() if module.endswith("q_proj")}) == 1
    free = sources_of(profile, dict(choose(profile, Budget(bpw=3.8), "exact").solution.choice))
    assert len({source for module, source in free.items() if module.endswith("q_proj")}) > 1


def test_ties_that_overlap_make_one_set() -> None:
    profile = profile_of("llama", (2, 3, 4, 6))
    rules = Rules(ties=("model.layers.0.self_attn.*", "*.o_proj"))
    chosen = sources_of(profile, dict(choose(profile, Budget(bpw=3.8), "exact", rules).solution.choice))
    together = {s for m, s in chosen.items() if m.endswith("o_proj") or m.startswith("model.layers.0.self_attn")}
    assert len(together) == 1


def test_a_banned_source_is_not_used() -> None:
    profile = profile_of("llama", (2, 3, 4, 6))
    rules = Rules((Constraint.parse("ban", "*.mlp.*=2"), Constraint.parse("ban", "*.mlp.*=6")))
    chosen = sources_of(profile, dict(choose(profile, Budget(bpw=3.8), "exact", rules).solution.choice))
    assert {source for module, source in chosen.items() if ".mlp." in module} <= {"3", "4"}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (Rules((Constraint("ban", "*.dwon_proj", "2"),)), r'ban "\*\.dwon_proj" matches no profiled module'),
        (Rules((Constraint("ban", "*.down_proj", "5"),)), r"none of the modules it names is offered 5; offered: "),
        (
            Rules(tuple(Constraint("ban", "*.down_proj", n) for n in "236")),
            r'ban "\*\.down_proj"=\d: leaves "model\.layers\.0\.mlp\.down_proj" no source',
        ),
        (Rules(ties=("*.dwon_proj",)), r'tie "\*\.dwon_proj" matches no profiled module'),
        (
            Rules(
                (
                    Constraint("pin", "model.layers.0.mlp.up_proj", "2"),
                    Constraint("pin", "model.layers.1.mlp.up_proj", "3"),
                ),
                ("*.up_proj",),
            ),
            r'tie "\*\.up_proj": its \d+ groups share no source',
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(rules: Rules, says: str) -> None:
    with pytest.raises(RecompileError, match=says):
        choose(profile_of("llama", (2, 3, 6)), Budget(bpw=3.8), "exact", rules)
