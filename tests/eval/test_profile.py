"""The exact profile: every swap equals the swap made by hand in transformers, and the journal survives anything."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.profile import exact as profile_module
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, Started, profile_exact
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import LEVELS, Cost, Profile, group_name, load_profile
from recompile.errors import JournalError, MismatchError, MissingWeight, RecompileError
from tests import tiny
from tests.journals import unsealed

BITS = (2, 3, 4)
BASE = 3


def measure(
    path: Path,
    architecture: str,
    ids: Tensor,
    options: ProfileOptions | None = None,
    found: Mapping[int, Path] | None = None,
) -> Profile:
    candidates = [(n, open_checkpoint(where)) for n, where in (found or tiny.variants(architecture, BITS)).items()]
    reference = open_checkpoint(tiny.base(architecture))
    options = options or ProfileOptions()
    started, *events = profile_exact(ProfileJob(reference, BASE, candidates, ids, path, options, "r0w5", "tests"))
    assert isinstance(started, Started)
    profile = events[-1]
    assert isinstance(profile, Profile)
    assert all(isinstance(event, Measured) for event in events[:-1])
    return profile


# ---- the same by hand ------------------------------------------------------------------------------------------------


class ByHand:
    """A transformers model whose modules are overwritten one group at a time."""

    def __init__(self, architecture: str, found: Mapping[int, Path], context: str, ids: Tensor) -> None:
        self.model = tiny.plain_model(tiny.base(architecture))
        self.candidates = {n: open_checkpoint(path) for n, path in found.items()}
        self.ids = ids
        self.reference = tiny.plain_logits(self.model, ids)
        if context == "base":
            for name, module in self.candidates[BASE].modules.items():
                if module.is_quantized:
                    self.put(name, self.candidates[BASE])

    def weight(self, module: str) -> Tensor:
        """The memory that holds a checkpoint module's weight: for an expert a part of a fused parameter."""
        block, _, rest = module.partition(".experts.")
        if not rest:
            return self.model.get_submodule(module).weight
        number, leaf = rest.split(".")
        experts = self.model.get_submodule(f"{block}.experts")
        if leaf == "down_proj":
            return experts.down_proj[int(number)]
        half = tiny.EXPERT_SIZE
        return experts.gate_up_proj[int(number)][slice(0, half) if leaf == "gate_proj" else slice(half, 2 * half)]

    @torch.no_grad()
    def put(self, module: str, checkpoint: Checkpoint) -> Tensor:
        memory = self.weight(module)
        before = memory.clone()
        memory.copy_(checkpoint.load(f"{module}.weight"))
        return before

    @torch.no_grad()
    def kl_rows(self, modules: Sequence[str], source: int) -> list[float]:
        before = {module: self.put(module, self.candidates[source]) for module in modules}
        kl = tiny.plain_kl(self.reference, tiny.plain_logits(self.model, self.ids)).mean(1).tolist()
        for module, value in before.items():
            self.weight(module).copy_(value)
        return kl


@pytest.mark.parametrize("context", ["clean", "base"])
@pytest.mark.parametrize(
    ("architecture", "level"),
    [
        *(pytest.param("llama-2", level, marks=() if level == "fused" else pytest.mark.sweep) for level in LEVELS),
        pytest.param("qwen2-moe", "fused", marks=pytest.mark.sweep),
        ("qwen2-moe", "block"),
        ("qwen2-moe", "expert"),
        ("qwen3-moe", "tensor"),
        ("llama-tied", "block"),
        pytest.param("gemma2", "block", marks=pytest.mark.sweep),
    ],
)
def test_every_swap_equals_the_swap_made_by_hand(architecture: str, level: str, context: str, tmp_path: Path) -> None:
    ids, found = tiny.rows(3, 20), tiny.variants(architecture, BITS)
    profile = measure(tmp_path / "p.jsonl", architecture, ids, ProfileOptions(level=level, context=context))
    by_hand = ByHand(architecture, found, context, ids)
    assert profile.is_complete
    assert profile.control is not None
    assert profile.control.kl_rows == pytest.approx(by_hand.kl_rows([], BASE), abs=1e-6)
    compared, largest = 0, 0.0
    for group in profile.header.groups:
        for source in BITS:
            if context == "base" and source == BASE:
                assert (group.name, str(source)) not in profile.measurements
                cost = profile.cost(group.name, str(source))
                assert cost is not None
                assert (cost.kl_nats, cost.std_error) == (0.0, 0.0)
                continue
            measured = profile.measurements[group.name, str(source)]
            wanted = by_hand.kl_rows(group.modules, source)
            assert measured.kl_rows == pytest.approx(wanted, abs=1e-6)  # float32 softmax on both sides of ~1e-7 each
            compared += 1
            largest = max(largest, measured.mean)
    assert compared == len(profile.header.groups) * (len(BITS) - (context == "base"))
    assert largest > 1e-3, "swaps that cost nothing would prove nothing"


@pytest.mark.parametrize(
    ("architecture", "rows", "tokens"),
    [
        ("llama-2", 5, 600),
        ("llama-2", 1, 7),
        *((name, 3, 20) for name in ("llama-2", "llama-tied", "qwen2-moe", "qwen3-moe", "gemma2", "gemma3")),
    ],
)
def test_the_clean_control_is_exactly_zero(architecture: str, rows: int, tokens: int, tmp_path: Path) -> None:
    """600 tokens: batches of 3 rows, the last one filled up; three chunks of logits."""
    options = ProfileOptions(level="layer", match=("model.layers.1.*",))
    profile = measure(tmp_path / "p.jsonl", architecture, tiny.rows(rows, tokens), options)
    assert profile.control is not None
    assert profile.control.kl_rows == (0.0,) * rows


@pytest.mark.parametrize("architecture", ["llama-2", "qwen2-moe"])
def test_a_candidate_that_is_the_context_costs_exactly_nothing(architecture: str, tmp_path: Path) -> None:
    """Swapping in the same weights runs the same arithmetic, whatever else shares the batch."""
    found = {**tiny.variants(architecture, (3, 4)), 33: tiny.variants(architecture, (3, 4))[3]}
    profile = measure(
        tmp_path / "p.jsonl", architecture, tiny.rows(3, 9), ProfileOptions(level="block", context="base"), found
    )
    assert profile.control is not None
    assert profile.control.mean > 0
    for group in profile.header.groups:
        assert profile.measurements[group.name, "33"].kl_rows == profile.control.kl_rows


def test_the_head_is_a_group(tmp_path: Path) -> None:
    """Also of a tied model: its variants store a head of their own."""
    for architecture in ("llama", "llama-tied"):
        found, ids = tiny.variants(architecture, BITS, head_bits=4), tiny.rows(3, 20)
        for context in ("clean", "base"):
            profile = measure(
                tmp_path / f"{architecture}-{context}.jsonl",
                architecture,
                ids,
                ProfileOptions(level="layer", context=context, head=True, match=("lm_head", "model.layers.2.*")),
                found,
            )
            assert [group.name for group in profile.header.groups] == ["lm_head", "model.layers.2"]
            by_hand = ByHand("llama" if architecture == "llama" else architecture, found, context, ids)
            if architecture == "llama-tied":
                by_hand.model.lm_head.weight = torch.nn.Parameter(by_hand.model.lm_head.weight.detach().clone())
                if context == "base":
                    by_hand.model.model.embed_tokens.weight.data.copy_(
                        open_checkpoint(tiny.base(architecture)).load("model.embed_tokens.weight")
                    )
                    by_hand.put("lm_head", by_hand.candidates[BASE])
            for source in (2, 4):
                wanted = by_hand.kl_rows(["lm_head"], source)
                assert profile.measurements["lm_head", str(source)].kl_rows == pytest.approx(wanted, abs=1e-6)
                assert max(wanted) > 1e-4


# ---- groups ----------------------------------------------------------------------------------------------------------


def groups_of(architecture: str, level: str, tmp_path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    candidates = {str(n): open_checkpoint(path) for n, path in tiny.variants(architecture, BITS).items()}
    groups = profile_module.make_groups(candidates, ProfileOptions(level=level, **options))
    for group in groups:
        for label, checkpoint in candidates.items():
            assert group.bits[label] == sum(8 * checkpoint.modules[m].size_bytes for m in group.modules)
        assert group.weights == sum(candidates["2"].modules[m].numel for m in group.modules)
        assert group.layer == int(group.name.split(".")[2])
    return {group.name: group.modules for group in groups}


def test_groups_of_a_dense_model(tmp_path: Path) -> None:
    layer = "model.layers.1"
    attention = {f"{layer}.self_attn.{name}_proj" for name in "qkvo"}
    mlp = {f"{layer}.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(groups_of("llama", "layer", tmp_path)[layer]) == attention | mlp
    blocks = groups_of("llama", "block", tmp_path)
    assert len(blocks) == 8
    assert set(blocks[f"{layer}.self_attn"]) == attention
    assert set(blocks[f"{layer}.mlp"]) == mlp
    fused = groups_of("llama", "fused", tmp_path)
    assert len(fused) == 16
    assert set(fused[f"{layer}.self_attn.q_proj+k_proj+v_proj"]) == {f"{layer}.self_attn.{name}_proj" for name in "qkv"}
    assert fused[f"{layer}.self_attn.o_proj"] == (f"{layer}.self_attn.o_proj",)
    assert set(fused[f"{layer}.mlp.gate_proj+up_proj"]) == {f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"}
    assert set(groups_of("llama", "tensor", tmp_path)) == {
        f"model.layers.{n}.{m.removeprefix(layer + '.')}" for n in range(4) for m in attention | mlp
    }


def test_groups_of_experts(tmp_path: Path) -> None:
    """Engines want one scheme for the routed experts of a layer; the shared expert is a linear like others."""
    mlp = "model.layers.1.mlp"
    fused = groups_of("qwen2-moe", "fused", tmp_path)
    assert set(fused[f"{mlp}.experts.gate_proj+up_proj"]) == {
        f"{mlp}.experts.{n}.{leaf}" for n in range(4) for leaf in ("gate_proj", "up_proj")
    }
    assert set(fused[f"{mlp}.experts.down_proj"]) == {f"{mlp}.experts.{n}.down_proj" for n in range(4)}
    assert set(fused[f"{mlp}.shared_expert.gate_proj+up_proj"]) == {
        f"{mlp}.shared_expert.gate_proj",
        f"{mlp}.shared_expert.up_proj",
    }
    assert not any("shared_expert_gate" in name or name.endswith("mlp.gate") for name in fused), "routers stay dense"
    blocks = groups_of("qwen2-moe", "block", tmp_path)
    assert len(blocks[f"{mlp}.experts"]) == 12
    assert len(blocks[f"{mlp}.shared_expert"]) == 3


def test_every_expert_matrix_is_a_group(tmp_path: Path) -> None:
    """And what is no routed expert keeps the groups that engines fuse."""
    mlp = "model.layers.1.mlp"
    found = groups_of("qwen2-moe", "expert", tmp_path)
    for n in range(4):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert found[f"{mlp}.experts.{n}.{leaf}"] == (f"{mlp}.experts.{n}.{leaf}",)
    others = {name for name in found if ".experts." not in name and ".layers.1." in name}
    assert others == {
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "model.layers.1.self_attn.o_proj",
        f"{mlp}.shared_expert.gate_proj+up_proj",
        f"{mlp}.shared_expert.down_proj",
    }


@pytest.mark.parametrize(
    ("module", "level", "group"),
    [
        ("model.layers.3.mlp.gate", "block", "model.layers.3.mlp.gate"),
        ("model.layers.3.mlp.shared_expert_gate", "block", "model.layers.3.mlp.shared_expert_gate"),
        ("model.layers.3.mlp.shared_experts.up_proj", "block", "model.layers.3.mlp.shared_experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "expert", "model.layers.3.mlp.shared_experts.gate_proj+up_proj"),
        ("model.layers.3.mlp.experts.11.w2", "expert", "model.layers.3.mlp.experts.11.w2"),
        ("model.layers.3.mlp.experts.11.w1", "fused", "model.layers.3.mlp.experts.w1+w3"),
        ("model.layers.3.block_sparse_moe.experts.0.w1", "block", "model.layers.3.block_sparse_moe.experts"),
        ("model.layers.3.mlp.gate", "layer", "model.layers.3"),
    ],
)
def test_names_of_groups_of_experts_and_routers(module: str, level: str, group: str) -> None:
    assert group_name(module, level) == group


@pytest.mark.parametrize("architecture", ["qwen2-moe", "qwen3-moe"])
@pytest.mark.parametrize("context", ["clean", "base"])
def test_experts_that_saw_no_token_are_unmeasured_and_get_a_prior(
    architecture: str, context: str, tmp_path: Path
) -> None:
    """Two tokens, two of four experts each. Who saw one is asked of transformers' router."""
    ids, path = tiny.rows(2, 1), tmp_path / "p.jsonl"
    profile = measure(path, architecture, ids, ProfileOptions(level="expert", context=context))
    model = tiny.plain_model(tiny.base(architecture))
    if context == "base":
        by_hand = ByHand(architecture, tiny.variants(architecture, BITS), context, ids)
        model = by_hand.model
    layers = [n for n in range(2) if hasattr(model.model.layers[n].mlp, "experts")]
    with torch.inference_mode():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    seen = {n: set(one.topk(2).indices.flatten().tolist()) for n, one in zip(layers, logits, strict=True)}
    unseen = [(n, expert) for n in layers for expert in range(4) if expert not in seen[n]]
    assert unseen, "the test needs an idle expert"
    wanted = {
        f"model.layers.{n}.mlp.experts.{expert}.{leaf}"
        for n, expert in unseen
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    assert set(profile.unreached()) == wanted
    assert load_profile(path) == profile, "the journal keeps it"
    for n, expert in unseen:
        cost = profile.cost(f"model.layers.{n}.mlp.experts.{expert}.up_proj", "2")
        similar = [profile.cost(f"model.layers.{n}.mlp.experts.{other}.up_proj", "2") for other in sorted(seen[n])]
        assert cost is not None
        assert cost.is_prior
        assert cost.kl_nats == pytest.approx(statistics.median(k.kl_nats for k in similar if k is not None))
        assert cost.std_error >= abs(cost.kl_nats) > 0


def test_a_swap_for_equal_weights_is_measured_as_zero_not_as_unreached(tmp_path: Path) -> None:
    found = {3: tiny.base("qwen2-moe"), 4: tiny.variants("qwen2-moe", BITS)[4]}
    profile = measure(tmp_path / "p.jsonl", "qwen2-moe", tiny.rows(4, 16), ProfileOptions(level="expert"), found)
    name = "model.layers.1.mlp.experts.2.up_proj"
    assert profile.cost(name, "3") == Cost(0.0, 0.0)
    assert profile.unreached() == []


def test_old_journals_without_the_mark_load(finished: Path, tmp_path: Path) -> None:
    assert "reached" not in finished.read_text(), "and where every token arrives the file is as it was"
    assert all(measurement.reached for measurement in load_profile(finished).measurements.values())


def test_match_and_skip(tmp_path: Path) -> None:
    found = groups_of("llama", "tensor", tmp_path, match=("*.mlp.*",), skip=("*.layers.0.*", "*down_proj.weight"))
    assert set(found) == {f"model.layers.{n}.mlp.{leaf}_proj" for n in (1, 2, 3) for leaf in ("gate", "up")}
    with pytest.raises(RecompileError, match="check match and skip"):
        groups_of("llama", "tensor", tmp_path, match=("*.no_such_proj",))


def test_a_candidate_without_a_module_is_named(tmp_path: Path) -> None:
    reference = open_checkpoint(tiny.base("llama"))
    short = open_checkpoint(tiny.variants("llama", BITS)[4])
    cut = Checkpoint(
        short.path, "cut", short.config, {n: i for n, i in short.tensors.items() if ".3.mlp.up_proj." not in n}
    )
    candidates = [(3, open_checkpoint(tiny.variants("llama", BITS)[3])), (4, cut)]
    with pytest.raises(MissingWeight, match=r"cut: has no module model\.layers\.3\.mlp\.up_proj"):
        list(profile_exact(ProfileJob(reference, 3, candidates, tiny.rows(1, 4), tmp_path / "p.jsonl")))
    assert list(tmp_path.iterdir()) == [], "what cannot be measured begins no journal"


def test_another_model_is_refused(tmp_path: Path) -> None:
    reference = open_checkpoint(tiny.base("llama"))
    candidates = [(3, open_checkpoint(tiny.variants("llama-2", (3,))[3]))]
    with pytest.raises(MismatchError, match="num_hidden_layers"):
        list(profile_exact(ProfileJob(reference, 3, candidates, tiny.rows(1, 4), tmp_path / "p.jsonl")))


def test_sizes_in_the_header_add_up(tmp_path: Path) -> None:
    """Groups, the quantized rest and everything else are the whole base variant, counted once."""
    options = ProfileOptions(level="layer", match=("model.layers.1.*",))
    header = measure(tmp_path / "p.jsonl", "llama-2", tiny.rows(1, 4), options).header
    base = open_checkpoint(tiny.variants("llama-2", BITS)[BASE])
    assert sum(g.bits["3"] for g in header.groups) + header.fixed_bits + header.other_bits == 8 * base.size_bytes
    weights = sum(module.numel for module in base.modules.values())
    assert header.group_weights + header.fixed_weights + header.other_weights == weights


# ---- the journal -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "p.jsonl"
    measure(path, "llama-2", tiny.rows(3, 8), ProfileOptions(level="block"))
    return path


def resume(path: Path, **options: Any) -> Profile:
    return measure(path, "llama-2", tiny.rows(3, 8), ProfileOptions(**{"level": "block", **options}))


def test_the_file_holds_every_rows_kl(finished: Path) -> None:
    header, *lines = [json.loads(line) for line in finished.read_text().splitlines()]
    assert header["kind"] == "recompile-profile"
    assert header["rows_sha256"] == "r0w5"
    assert (header["rows"], header["row_tokens"]) == (3, 8)
    assert [entry["id"] for entry in header["candidates"]] == list(BITS)
    assert all(len(line["kl_rows"]) == 3 for line in lines)
    assert [line["source"] for line in lines] == ["2", "3", "4"] * 4 + [None]
    profile = load_profile(finished)
    assert profile.is_complete
    group = profile.header.groups[0].name
    cost = profile.cost(group, "2")
    rows = torch.tensor(profile.measurements[group, "2"].kl_rows, dtype=torch.float64)
    assert cost is not None
    assert cost.kl_nats == pytest.approx(float(rows.mean()), rel=1e-12)
    assert cost.std_error == pytest.approx(float(rows.std()) / math.sqrt(3), rel=1e-9)


def test_a_finished_profile_is_not_measured_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(finished.read_bytes())
    monkeypatch.setattr(profile_module.ExactProfiler, "_run_reference", lambda self: pytest.fail("ran again"))
    assert resume(path).is_complete
    assert path.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("line", [-1, -2])
def test_cut_off_at_any_byte_of_a_line_it_goes_on(finished: Path, tmp_path: Path, line: int) -> None:
    """kill -9 in the middle of a write: what follows the last whole line is dropped and measured again."""
    whole = finished.read_bytes()
    lines = whole.splitlines(keepends=True)
    before = b"".join(lines[:line])
    path = tmp_path / "p.jsonl"
    for cut in range(len(before), len(before) + len(lines[line])):
        path.write_bytes(whole[:cut])
        if path.read_bytes().endswith(b"\n"):
            assert load_profile(path).measurements.keys() <= load_profile(finished).measurements.keys()
        else:
            with pytest.raises(JournalError, match="the last line was cut off"):
                load_profile(path)
        if (cut - len(before)) % 29 and cut + 2 < len(before) + len(lines[line]):
            continue  # reading it above costs nothing; measuring again is tried at some of the places
        assert resume(path).is_complete
        assert path.read_bytes() == whole


def test_what_follows_the_last_whole_line_is_gone_at_once(finished: Path, tmp_path: Path) -> None:
    """Longer than any line that could overwrite it; and there is nothing left to measure."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(finished.read_bytes() + b"y" * 100_000)
    assert resume(path).is_complete
    assert path.read_bytes() == finished.read_bytes()


def test_interrupted_after_every_measurement_it_gives_the_same_file(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    base, ids, options = open_checkpoint(tiny.base("llama-2")), tiny.rows(3, 8), ProfileOptions(level="block")
    candidates = [(n, open_checkpoint(where)) for n, where in tiny.variants("llama-2", BITS).items()]
    for _ in range(40):
        events = profile_exact(ProfileJob(base, BASE, candidates, ids, path, options, "r0w5", "tests"))
        next(events)
        if isinstance(next(events), Profile):
            break
        events.close()
    assert path.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize(
    ("options", "field"), [({"level": "layer"}, "level was"), ({"context": "base"}, 'context was "clean", is "base"')]
)
def test_another_measurement_is_refused(finished: Path, tmp_path: Path, options: dict[str, Any], field: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(finished.read_bytes())
    with pytest.raises(JournalError, match=field):
        resume(path, **options)
    assert path.read_bytes() == finished.read_bytes()


def test_other_rows_and_other_builds_are_refused(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(finished.read_bytes())
    with pytest.raises(JournalError, match="rows was 3, is 2"):
        measure(path, "llama-2", tiny.rows(2, 8), ProfileOptions(level="block"))
    rebuilt = tiny.variants("llama-2", BITS, method="mse")
    with pytest.raises(JournalError, match="other models, or their config"):
        measure(path, "llama-2", tiny.rows(3, 8), ProfileOptions(level="block"), rebuilt)


def test_a_directory_spelled_another_way_is_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(finished.read_bytes())
    found = tiny.variants("llama-2", BITS)
    monkeypatch.chdir(found[3].parent)
    spelled = {n: Path(".") / where.name for n, where in found.items()}
    assert measure(path, "llama-2", tiny.rows(3, 8), ProfileOptions(level="block"), spelled).is_complete
    assert path.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda line: line[:-3] + b"\n", r":3:\d+: not JSON"),
        (lambda line: b"\n", ":3:1: not JSON"),
        (lambda line: line.replace(b'"2"', b'"9"').replace(b'"3"', b'"9"'), ":3: measures .* does not know"),
        (lambda line: json.dumps({**json.loads(line), "kl_rows": [1.0]}).encode() + b"\n", ":3: has 1 rows"),
        (lambda line: b"\xff" + line, ":3: not UTF-8 text"),
    ],
)
def test_a_damaged_line_in_the_middle_is_refused(finished: Path, tmp_path: Path, damage: Any, says: str) -> None:
    path = tmp_path / "p.jsonl"
    shutil.copyfile(finished, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    with pytest.raises(JournalError, match=r":3: .*its checksum does not fit"):
        resume(path)
    lines = unsealed(shutil.copy(finished, path)).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    with pytest.raises(JournalError, match=says):
        resume(path)


@pytest.mark.parametrize("text", [b"not json\n", b'{"kind": "other"}\n', b'{"kind": "recompile-profile"}\n', b"[]\n"])
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(text)
    with pytest.raises(JournalError, match="1: "):
        resume(path)
    assert path.read_bytes() == text


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_cap_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecompileError, match=r"max_memory 1 MiB is too little: this run needs \d+ MiB"):
        resume(tmp_path / "p.jsonl", max_memory_bytes=2**20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "architecture", [pytest.param("llama-2", marks=pytest.mark.sweep), "llama-tied", "qwen2-moe", "gemma2"]
)
@pytest.mark.parametrize("context", [pytest.param("clean", marks=pytest.mark.sweep), "base"])
def test_reading_layers_again_changes_nothing(
    architecture: str, context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory layers are read again for every wave, and swaps of several groups share one."""
    options = ProfileOptions(level="fused", context=context)
    plain = measure(tmp_path / "a.jsonl", architecture, tiny.rows(3, 20), options)
    waves: list[int] = []
    run = profile_module.ExactProfiler._measure_wave

    def note(self: Any, index: int, states: Tensor, after: Tensor, wave: Sequence[Any]) -> Any:
        waves.append(len(wave))
        return run(self, index, states, after, wave)

    monkeypatch.setattr(profile_module.ExactProfiler, "_measure_wave", note)
    monkeypatch.setattr(profile_module, "process_bytes", lambda cap: 0)
    plan = smallest_plan(architecture, tiny.rows(3, 20), options)
    state = 3 * 20 * tiny.HIDDEN * 4
    options = ProfileOptions(level="fused", context=context, max_memory_bytes=plan + 4 * state)
    capped = measure(tmp_path / "b.jsonl", architecture, tiny.rows(3, 20), options)
    assert max(waves) > len(BITS), "no two groups shared a wave, so nothing was tried here"
    assert capped.control == plain.control
    if architecture != "qwen2-moe":
        assert capped.measurements == plain.measurements
        return
    # A batch of other swaps sends other numbers of tokens through an expert: float32 rounding of another matrix shape.
    for swap, found in plain.measurements.items():
        assert capped.measurements[swap].kl_rows == pytest.approx(found.kl_rows, abs=1e-7)


def smallest_plan(architecture: str, ids: Tensor, options: ProfileOptions) -> int:
    """The least memory, program apart, that a run is planned to take: what the refusal of a cap of nothing says."""
    found = tiny.variants(architecture, BITS)
    candidates = [(n, open_checkpoint(path)) for n, path in found.items()]
    job = ProfileJob(open_checkpoint(tiny.base(architecture)), BASE, candidates, ids, Path(), options)
    model, header = job.model(), job.header(torch.float32)
    low, high = 0, 2**34
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            profile_module.plan_memory(model, header, middle)
            high = middle
        except RecompileError:
            low = middle
    return high


def test_an_unknown_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecompileError, match='context: found "dirty"'):
        resume(tmp_path / "p.jsonl", context="dirty")
