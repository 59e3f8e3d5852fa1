"""What config.json says after a merge reads the same to transformers and to vLLM, and matches exactly what it should.

The two matching rules are written here from their description. transformers takes the exact name, then patterns in
alphabetical order, then the class. vLLM takes targets in the order of the file, and knows fused modules by names of
their own, which it tries first, and then each shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import FormatError, MismatchError
from recompile.formats.compressed_tensors import NumberedNames, Targets, merged_config, targets_for
from tests import tiny

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def matches(target: str, name: str, exact: bool = True) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else exact and target == name


def as_transformers(groups: Mapping[str, Any], name: str) -> str | None:
    """The group of a Linear."""
    targets = {target: group for group, body in groups.items() for target in body["targets"]}
    if name in targets:
        return targets[name]
    for target in sorted(target for target in targets if target.startswith("re:")):
        if matches(target, name):
            return targets[target]
    return targets.get("Linear")


def as_vllm(groups: Mapping[str, Any], ignore: Sequence[str], name: str, shards: Sequence[str] = ()) -> str | None:
    """The group of a module; for a fused one `name` is its own name and `shards` the names of its parts.

    Raises AssertionError where vLLM would refuse: some shards ignored and some not, or a shard that nothing matches.
    """
    ignored = [any(matches(target, shard) for target in ignore) for shard in shards or (name,)]
    assert len(set(ignored)) == 1, "vLLM refuses a layer of which only some shards are ignored"
    if ignored[0]:
        return None
    ordered = [(target, group) for group, body in groups.items() for target in body["targets"]]
    for target, group in ordered:
        if matches(target, name):
            return group
    found = [next((group for target, group in ordered if matches(target, shard)), None) for shard in shards]
    assert None not in found, f"vLLM finds no scheme for {name}"
    return found[0] if found else None


# ---- targets ---------------------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> list[str]:
    """Names of the linears of a dense or MoE model, with whatever else stands in a checkpoint."""
    prefix = draw(st.sampled_from(["model.layers.", "model.language_model.layers.", "transformer.h.", "layers."]))
    layers = draw(st.integers(1, 13))  # two digits: layer 1 must not catch 11
    names = []
    for layer in range(layers):
        names += [f"{prefix}{layer}.{leaf}" for leaf in LEAVES]
        if draw(st.booleans()):
            names += [f"{prefix}{layer}.mlp.experts.{n}.{leaf}" for n in range(draw(st.integers(1, 3))) for leaf in MLP]
            names += [f"{prefix}{layer}.mlp.shared_expert.{leaf}" for leaf in MLP] + [f"{prefix}{layer}.mlp.gate"]
        else:
            names += [f"{prefix}{layer}.mlp.{leaf}" for leaf in MLP]
    return [*names, "lm_head", "model.embed_tokens", "visual.blocks.0.attn.q_proj"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_targets_match_exactly_the_wanted_modules(data: st.DataObject) -> None:
    names = data.draw(models())
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    targets = targets_for(sorted(wanted), NumberedNames(names))
    assert {name for name in names if any(matches(target, name) for target in targets)} == wanted
    for target in targets:
        if target.startswith("re:"):
            assert target.startswith("re:.*"), "engines rename prefixes"
            assert target.endswith("$")
            assert not re.search(r"(?<!\\)\.(?!\*)", target[3:].replace("\\d+", "")), (
                "every dot but that of .* is literal"
            )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_pattern_for_a_shard_takes_a_fused_module(data: st.DataObject) -> None:
    names = data.draw(models())
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    fused = {f"{name.rpartition('.')[0]}.{whole}" for name in names for whole in FUSED}
    for target in targets_for(sorted(wanted), NumberedNames(names)):
        assert not any(matches(target, name) for name in fused)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_targets_do_not_depend_on_order(data: st.DataObject) -> None:
    names = data.draw(models())
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    shuffled = data.draw(st.permutations(wanted))
    assert targets_for(wanted, NumberedNames(names)) == targets_for(shuffled, NumberedNames(names))


def test_targets_by_hand() -> None:
    names = [f"model.layers.{n}.{leaf}" for n in range(3) for leaf in ("mlp.up_proj", "mlp.down_proj")] + ["lm_head"]
    known = NumberedNames(names)
    assert targets_for([n for n in names if "up" in n], known) == [r"re:.*model\.layers\.\d+\.mlp\.up_proj$"]
    assert targets_for(names[:4], known) == [r"re:.*model\.layers\.(0|1)\.mlp\.(down_proj|up_proj)$"]
    assert targets_for(["model.layers.2.mlp.up_proj"], known) == [r"re:.*model\.layers\.2\.mlp\.up_proj$"]
    assert targets_for(["lm_head"], known) == ["lm_head"]


# ---- whole configs ---------------------------------------------------------------------------------------------------


def scheme(bits: int, group_size: int = 32, **extra: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {"targets": ["Linear"], "weights": {**weights, "dynamic": False, **extra}, "input_activations": None}


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_both_engines_find_every_modules_own_scheme(data: st.DataObject) -> None:
    """Fused sets get one scheme each here, as vLLM wants it; everything else is mixed freely."""
    names = data.draw(models())
    choice: dict[str, int | None] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        siblings = next((shards for shards in FUSED.values() if leaf in shards), (leaf,))
        known = next((choice[f"{parent}.{s}"] for s in siblings if f"{parent}.{s}" in choice), -1)
        choice[name] = data.draw(st.sampled_from([None, 2, 3, 4, 8])) if known == -1 else known
    for never in ("model.embed_tokens", "visual.blocks.0.attn.q_proj"):
        choice[never] = None
    quantized = [(name, scheme(bits)) for name, bits in choice.items() if bits]
    dense = [name for name, bits in choice.items() if not bits]
    merged = merged_config({}, quantized, dense, names)
    groups, ignore = merged["config_groups"], merged["ignore"]
    bits_of = {group: body["weights"]["num_bits"] for group, body in groups.items()}
    for name, bits in choice.items():
        if name in ignore:
            assert bits is None
            assert as_transformers(groups, name) is None, "disjoint: what is ignored is matched by nothing either"
            continue
        for found in (as_transformers(groups, name), as_vllm(groups, ignore, name)):
            assert found is not None
            assert bits_of[found] == bits
        own = Targets(merged).group_of(name)
        assert own is not None
        assert own["weights"]["num_bits"] == bits
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for whole, shards in FUSED.items():
            if leaf == shards[0] and choice[name] is not None:
                found = as_vllm(groups, ignore, f"{parent}.{whole}", [f"{parent}.{shard}" for shard in shards])
                assert found is not None
                assert bits_of[found] == choice[name]


def test_one_group_a_scheme() -> None:
    names = [f"model.layers.{n}.mlp.{leaf}" for n in range(4) for leaf in MLP]
    quantized = [(name, scheme(4 if "down" in name else 3, observer=None)) for name in names[:-1]]
    quantized.append((names[-1], scheme(4)))  # equal to the others but for a key that is null there
    merged = merged_config({}, quantized, ["lm_head"], [*names, "lm_head"])
    assert [body["weights"]["num_bits"] for body in merged["config_groups"].values()] == [3, 4]
    assert merged["format"] == "pack-quantized"
    assert merged["quantization_status"] == "compressed", "else transformers loads random weights"
    assert merged["quant_method"] == "compressed-tensors"
    assert merged["ignore"] == ["lm_head"]
    assert all(body["format"] == "pack-quantized" for body in merged["config_groups"].values())


def test_args_of_a_source_are_carried_unchanged() -> None:
    group = scheme(4, actorder="static", observer="minmax")
    merged = merged_config({}, [("model.layers.0.mlp.up_proj", group)], [], ["model.layers.0.mlp.up_proj"])
    (body,) = merged["config_groups"].values()
    assert body["weights"] == group["weights"]


def test_several_formats_are_mixed_precision() -> None:
    names = ["model.layers.0.a.x_proj", "model.layers.0.a.y_proj"]
    quantized = [(names[0], scheme(4)), (names[1], {**scheme(8), "format": "float-quantized"})]
    assert merged_config({}, quantized, [], names)["format"] == "mixed-precision"


def test_group_sizes_tell_schemes_apart() -> None:
    names = ["model.layers.0.a.x_proj", "model.layers.0.a.y_proj"]
    merged = merged_config({}, [(names[0], scheme(4, 32)), (names[1], scheme(4, 64))], [], names)
    assert sorted(body["weights"]["group_size"] for body in merged["config_groups"].values()) == [32, 64]


def test_what_the_base_says_beside_is_kept_and_rotations_are_refused() -> None:
    merged = merged_config({"kv_cache_scheme": {"num_bits": 8}, "sparsity_config": {}}, [], [], [])
    assert merged["kv_cache_scheme"] == {"num_bits": 8}
    assert merged["sparsity_config"] == {}
    with pytest.raises(MismatchError, match="transform_config"):
        merged_config({"transform_config": {"config_groups": {"u": 1}}}, [], [], [])


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_groups_are_found_as_the_library_finds_them() -> None:
    config = {
        "config_groups": {
            "a": {"targets": ["Linear", "re:.*mlp.*"], "n": "class or mlp"},
            "b": {"targets": ["re:.*down_proj$", "model.layers.0.mlp.down_proj"], "n": "down"},
        }
    }

    def name_of(module: str) -> object:
        found = Targets(config).group_of(module)
        return found["n"] if found else None

    assert name_of("model.layers.0.mlp.down_proj") == "down", "the exact name first"
    assert name_of("model.layers.1.mlp.down_proj") == "down", "then patterns in alphabetical order"
    assert name_of("model.layers.1.mlp.up_proj") == "class or mlp"
    assert name_of("model.layers.1.self_attn.q_proj") == "class or mlp"
    alone = {"config_groups": {"b": config["config_groups"]["b"]}}
    assert Targets(alone).group_of("model.layers.1.self_attn.q_proj") is None
    assert Targets({}).group_of("x") is None
    with pytest.raises(FormatError, match="no regular expression"):
        Targets({"config_groups": {"a": {"targets": ["re:("]}}})


def test_a_packed_module_that_no_group_covers_is_refused(tmp_path: Any) -> None:
    directory = tiny.copy_of(tiny.variants("llama-2", (3,))[3], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*\.mlp\..*$"]
    (directory / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(directory)
    assert found.load("model.layers.0.mlp.up_proj.weight").shape == (128, 64)
    with pytest.raises(FormatError, match=r"self_attn\.q_proj is stored .*, and no target"):
        found.load("model.layers.0.self_attn.q_proj.weight")
