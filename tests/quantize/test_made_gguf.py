"""GGUF types made on the fly equal the files that model_quantize writes; a mix from a recipe equals a merge of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from eval.metrics import kl_divergence
from eval.profile.exact import ProfileJob, ProfileOptions, SwappedSource, profile_exact
from eval.profile.sketch import SketchOptions, profile_sketch
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.costs import Profile, ProfileGroup, load_profile
from recompile.errors import FormatError, RecipeError, UnsupportedError
from recompile.formats import gguf_encode
from recompile.gguf.container import open_gguf
from recompile.merge.overlay import build_overlay
from recompile.merge.type_recipes import parse_type_recipe
from recompile.merge.write_gguf import execute_gguf, plan_gguf
from recompile.quantize import fake_quant
from recompile.quantize.gguf import Importance, base_tensors, collect_importance, plan_variants
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.gguf_mix import makes_gguf, mix_of, types_got
from recompile.quantize.lazy_variant import (
    MadeVariant,
    fallbacks_of,
    make_variant,
    make_variants,
    making_bytes,
    plainly_named,
    spec_of,
)
from recompile.recipe.recipe import load_recipe, parse_recipe
from tests import tiny
from tests.commands import refusal, run
from tests.gguf_models import VOCAB
from tests.quantize.test_gguf_variants import tokenizer_file, write_hf

pytest.importorskip("libgguf")
TYPES = ["Q4_K", "IQ4_XS", "IQ4_KS", "Q8_0"]


def calibrated(base: Checkpoint) -> Importance:
    passing = collect_importance(base, torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0)))
    *_, found = passing
    assert isinstance(found, Importance)
    return found


def files(base: Path, out: Path, names: Sequence[str], importance: Importance | None) -> dict[str, Checkpoint]:
    keys = open_gguf(tokenizer_file(base.parent / "tokens.gguf"))
    for _ in build_variants(
        plan_variants(open_checkpoint(base), out, names, tokenizer_from=keys, importance=importance)
    ):
        pass
    return {name: open_checkpoint(out / f"{base.name}-{name}.gguf") for name in names}


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma2"])
def test_a_made_type_is_the_file_of_it(model_type: str, tmp_path: Path) -> None:
    """Values and stored sizes of every module: rows in another order, tied heads, experts, types that do not fit."""
    path = write_hf(tmp_path / "hf", model_type, inner=256)
    base = open_checkpoint(path)
    importance = calibrated(base)
    written = files(path, tmp_path, TYPES, importance)
    made = dict(make_variants(base, [spec_of(name) for name in TYPES], importance.values))
    for name, there in written.items():
        mine = made[name]
        assert set(mine.modules) == set(there.modules)
        for module, stored in there.modules.items():
            assert mine.modules[module].size_bytes == stored.size_bytes, (name, module)
            assert (mine.modules[module].numel, mine.modules[module].format) == (stored.numel, stored.format), module
            if module in mine.made:
                have, want = mine.load(f"{module}.weight"), there.load(f"{module}.weight")
                assert torch.equal(have, want), (name, module)
        assert sum(m.size_bytes for m in mine.modules.values()) == sum(m.size_bytes for m in there.modules.values())
    down = "model.layers.0.mlp.down_proj" if model_type != "qwen3_moe" else "model.layers.0.mlp.experts.0.down_proj"
    assert (made["Q4_K"].fallbacks.get(down) is None) == (model_type != "qwen3_moe")
    assert made["Q4_K"].fallbacks["model.layers.0.self_attn.q_proj"] == ("Q4_K", "Q5_0")
    assert any(line.endswith("asked to be Q4_K get Q5_0") for line in fallbacks_of(made.items()))
    assert not made["Q8_0"].fallbacks


def test_what_several_types_fall_back_to_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """IQ4_XS and IQ4_KS are both IQ4_NL on rows of 64; the keeping is bounded and in the plan."""
    base = open_checkpoint(write_hf(tmp_path / "hf", "llama", inner=256))
    calls: list[str] = []

    def counted(kind: fake_quant.GgufType, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(kind.name)
        return gguf_encode.quantize_rows(kind, *arguments)

    monkeypatch.setattr(fake_quant, "quantize_rows", counted)
    made = dict(make_variants(base, [spec_of(name) for name in ("IQ4_XS", "IQ4_KS", "Q8_0")]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(made["IQ4_XS"].load(name), made["IQ4_KS"].load(name))
    made["Q8_0"].load(name)
    made["Q8_0"].load(name)
    assert calls == ["IQ4_NL", "Q8_0", "Q8_0"]
    largest = 64 * 256
    assert making_bytes(made.values()) == 8 * largest + fake_quant.SHARED_BYTES
    assert making_bytes([make_variant(base, {"type": "Q8_0"})]) == 8 * largest
    assert making_bytes([base]) == 0
    monkeypatch.setattr(fake_quant, "SHARED_BYTES", 2 * 64 * 36)  # of two q_proj in IQ4_NL
    made = dict(make_variants(base, [spec_of(name) for name in ("IQ4_XS", "IQ4_KS")]))
    kept = made["IQ4_XS"].maker
    assert isinstance(kept, fake_quant.GgufMaker)
    for layer in range(2):
        for leaf in "qo":
            made["IQ4_XS"].load(f"model.layers.{layer}.self_attn.{leaf}_proj.weight")
    assert [module.rpartition(".")[2] for module, _ in kept.shared._passing] == ["q_proj", "o_proj"]


def test_a_choice_is_called_what_it_becomes(tmp_path: Path) -> None:
    base = open_checkpoint(write_hf(tmp_path / "hf", "llama", inner=256))
    made = {str(name): found for name, found in make_variants(base, [spec_of(n) for n in ("IQ3_S", "Q4_K", "IQ4_NL")])}
    modules = {"q": "model.layers.0.self_attn.q_proj", "down": "model.layers.0.mlp.down_proj"}
    groups = [ProfileGroup(name, (module,), 1, dict.fromkeys(made, 1), 0) for name, module in modules.items()]
    assert plainly_named({"q": "IQ3_S", "down": "IQ3_S"}, groups, made) == {"q": "IQ4_NL", "down": "IQ3_S"}
    assert plainly_named({"q": "Q4_K", "down": "Q4_K"}, groups, made) == {
        "q": "Q4_K",
        "down": "Q4_K",
    }  # no Q5_0 offered


def test_encodings_are_kept_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sweep encodes nothing that fitted, and the plan counts what is kept."""
    base = open_checkpoint(write_hf(tmp_path / "hf", "llama"))
    calls: list[str] = []

    def counted(kind: fake_quant.GgufType, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(kind.name)
        return gguf_encode.quantize_rows(kind, *arguments)

    monkeypatch.setattr(fake_quant, "quantize_rows", counted)
    specs = [spec_of(name) for name in ("Q4_0", "Q8_0")]
    size = 64 * 36  # of a q_proj as Q4_0
    name = "model.layers.{}.self_attn.q_proj.weight"
    for room, wanted in ((1 << 20, 2), (size, 3), (0, 4)):
        calls.clear()
        made = dict(make_variants(base, specs, None, frozenset(), room))
        for _ in range(2):
            for layer in range(2):
                made["Q4_0"].load(name.format(layer))
        assert len(calls) == wanted
        # the head is Q8_0 in both, so that it is kept once, and for a while where the room is spent
        stored = sum(v.modules[m].size_bytes for v in made.values() for m in v.made) - VOCAB * 64 // 32 * 34
        kept = stored if stored <= room else room + fake_quant.SHARED_BYTES
        assert making_bytes(made.values()) == 8 * 64 * 96 + kept


def test_a_profile_of_made_types_is_that_of_the_files(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", "llama", inner=256)
    base, ids = open_checkpoint(path), torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    names = ["Q4_K", "Q8_0"]
    on_disk = [(name, found) for name, found in files(path, tmp_path, names, None).items()]
    profiles = []
    for label, candidates in (("disk", on_disk), ("made", make_variants(base, [spec_of(name) for name in names]))):
        options = ProfileOptions(level="tensor")
        *_, profile = profile_exact(ProfileJob(base, "Q4_K", candidates, ids, tmp_path / label, options))
        assert isinstance(profile, Profile)
        profiles.append(profile)
    disk, made = profiles
    assert made.measurements == disk.measurements
    assert sorted(made.header.groups, key=str) == sorted(disk.header.groups, key=str)  # in the order of each file
    assert made.header.other_bits == disk.header.other_bits
    assert made.header.fixed_bits == disk.header.fixed_bits
    assert [candidate.spec for candidate in made.header.candidates] == [{"type": "Q4_K"}, {"type": "Q8_0"}]
    assert max(m.mean for m in made.measurements.values()) > 1e-5


def test_profile_optimize_quantize_by_commands(tmp_path: Path) -> None:
    """The whole way without a variant: the promised size is the file's, every type is the recipe's, and the bytes are
    those of a merge of whole files; other tools' recipes of the same choice make the same file."""
    path = write_hf(tmp_path / "hf", "llama", inner=256)
    profile, recipe, mix = tmp_path / "p.jsonl", tmp_path / "mix.yaml", tmp_path / "MIX.gguf"
    importance = calibrated(open_checkpoint(path))
    save_file({name: value.clone() for name, value in importance.values.items()}, tmp_path / "i.safetensors")
    save_file({"input_ids": torch.randint(0, VOCAB, (2, 16))}, tmp_path / "rows.safetensors")
    written = files(path, tmp_path, TYPES, importance)
    make = ("--candidates", ",".join(TYPES), "--importance-rows", 0, "-i", "Q4_K", "--level", "tensor")
    rows = ("--input-ids", tmp_path / "rows.safetensors", "--quiet")
    said = run(model_profile, "-mb", path, *make, "--mode", "sketch", "--samples", 4, "-o", profile, *rows)
    assert "Q4_K: 13 of 16 matrices asked to be Q4_K get Q5_0" in said  # all but the two down_proj and the head
    assert load_profile(profile).is_complete
    output = run(model_optimize, profile, "--target-bpw", "5.0123", "-o", recipe, "--no-check")
    assert "-o OUT.gguf" in output
    assert makes_gguf(load_recipe(recipe))
    common = ("-i", path, "--tokenizer-from", tmp_path / "tokens.gguf", "--imatrix", tmp_path / "i.safetensors")
    run(model_quantize, *common, "-o", mix, "-or", recipe, "--quiet")
    promised = load_recipe(recipe).provenance
    made = open_checkpoint(mix)
    assert made.size_bytes == promised["total_bytes"]
    assert 4.9 < promised["bpw"] <= 5.0123

    lines = recipe.read_text()
    for name in TYPES:
        lines = lines.replace(f"type: {name}}}", f"model_dir: {tmp_path}/hf-{name}.gguf}}")
    merged = tmp_path / "merged.gguf"
    lines = lines[: lines.index("base:")]
    overlay = build_overlay(written["Q4_K"], parse_recipe(lines))
    for _ in execute_gguf(plan_gguf(overlay, merged)):
        pass
    have, want = open_gguf(mix), open_gguf(merged)
    assert list(have.tensors) == list(want.tensors)
    assert {tensor.type.name for tensor in have.tensors.values()} >= {"Q5_0", "Q8_0"}
    for name in want.tensors:
        assert (have.tensors[name].type, have.read(name)) == (want.tensors[name].type, want.read(name)), name
    assert have.value("general.file_type") == want.value("general.file_type")
    assert have.value("recompile.recipe") == recipe.read_text()

    types = {name: tensor.type.name for name, tensor in have.tensors.items()}
    assert "IQ4_KS" in types.values()
    for dialect in ("llama-quantize", "ik-custom-q", "thireus"):
        result = CliRunner().invoke(recompile, ["-i", str(path), "-or", str(recipe), "--emit", dialect])
        assert ("IQ4_KS: ik_llama.cpp's own" in result.stderr) == (dialect == "llama-quantize")
        assert parse_type_recipe(result.stdout, dialect=dialect).resolve(types) == types
        (tmp_path / "other.txt").write_text(result.stdout)
        again = tmp_path / f"{dialect}.gguf"
        run(model_quantize, *common, "-o", again, "-or", tmp_path / "other.txt", "--quiet")
        theirs = open_gguf(again)
        assert all(theirs.read(name) == have.read(name) for name in types)

    size = promised["total_bytes"] - 3000
    run(model_optimize, profile, "--target-size", size, "--ban", "*=IQ4_KS", "-o", recipe, "--no-check")
    assert load_recipe(recipe).provenance["total_bytes"] <= size
    assert "iq4_ks" not in run(recompile, "-i", path, "-or", recipe, "--emit", "ik-custom-q")


def test_an_interrupted_profile_of_types_goes_on(tmp_path: Path) -> None:
    """The journal knows the types and the importance: the same command goes on, another importance is refused."""
    path = write_hf(tmp_path / "hf", "llama")
    save_file({"input_ids": torch.randint(0, VOCAB, (2, 16))}, tmp_path / "rows.safetensors")
    rows = ("--input-ids", tmp_path / "rows.safetensors", "--quiet", "-o", tmp_path / "p.jsonl")
    found = make_variants(open_checkpoint(path), [spec_of("Q4_0"), spec_of("Q8_0")])
    arguments = ("-mb", path, "--candidates", "Q4_0,Q8_0", "--importance-rows", 0, "--level", "block", *rows)
    run(model_profile, *arguments)
    whole = (tmp_path / "p.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])  # cut off by a crash
    said = run(model_profile, *arguments)
    assert ", 0 of them already" not in said
    assert load_profile(tmp_path / "p.jsonl").is_complete
    assert sorted((tmp_path / "p.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    values = {name: torch.rand(64) for name in found[0][1].made}
    importances = [make_variant(open_checkpoint(path), {"type": "Q4_0"}, given).fingerprint for given in (None, values)]
    assert importances[0] != importances[1]
    assert importances[0] == found[0][1].fingerprint


# ---- what a recipe says ----------------------------------------------------------------------------------------------


def mix_recipe(body: str, folder: Path, model_type: str = "llama") -> Mapping[str, str]:
    base = open_checkpoint(write_hf(folder / "hf", model_type))
    tensors = base_tensors(base)
    mix = mix_of(parse_recipe(body), base, tensors, None, "mix.gguf")
    return types_got(mix.kinds, tensors)


def test_names_of_both_kinds_and_what_no_line_names(tmp_path: Path) -> None:
    """GGUF names and Hugging Face's; the head of an unnamed rest is its preset's, one that is named is the type's."""
    body = """
    sources: [{id: a, type: Q5_0}, {id: b, type: iq4_nl}]
    overrides:
      - {key: "blk.*.ffn_down.*", source: a}
      - {key: "model.layers.0.self_attn.q_proj.*", source: b}
    base: {type: Q4_0}
    """
    types = mix_recipe(body, tmp_path)
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert (types["blk.0.attn_q.weight"], types["blk.1.attn_q.weight"]) == ("IQ4_NL", "Q4_0")
    assert types["output.weight"] == "Q8_0"  # Q6_K, whose blocks do not fit
    assert types["output_norm.weight"] == "F32"
    named = mix_recipe(body.replace('"blk.*.ffn_down.*"', '"output.weight"'), tmp_path)
    assert named["output.weight"] == "Q5_0"
    kept = mix_recipe(body.replace("base: {type: Q4_0}", ""), tmp_path)
    assert kept["blk.1.attn_q.weight"] == "F32"  # as the base has it


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sources: [{id: a, model_dir: x.gguf}]\noverrides: []\nbase: {type: Q4_0}", "x.gguf is a directory"),
        ("sources: [{id: a, bits: 4}]\noverrides: []\nbase: {type: Q4_0}", "is no GGUF type"),
        ("sources: [{id: a, type: Q4_0}]\noverrides: []\nbase: {bits: 4}", "wanted a GGUF type"),
        ("sources: [{id: a, type: Q4_X}]\noverrides: []", "did you mean IQ4_XS"),
        ("sources: [{id: a, type: Q4_0}]\noverrides: [{key: blk.0.attn_qq.weight, source: a}]", "did you mean"),
        (
            "sources: [{id: a, type: Q4_0}]\noverrides: [{key: '*.experts.1.*', source: a}]",
            "4 experts and has one type",
        ),
    ],
)
def test_recipes_that_cannot_be_made_say_why(body: str, message: str, tmp_path: Path) -> None:
    model_type = "qwen3_moe" if "experts" in body else "llama"
    with pytest.raises((RecipeError, FormatError), match=message):
        mix_recipe(body, tmp_path, model_type)


def test_what_the_commands_refuse(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", "qwen3_moe")
    save_file({"input_ids": torch.randint(0, VOCAB, (2, 16))}, tmp_path / "rows.safetensors")
    given = ("--input-ids", tmp_path / "rows.safetensors", "--importance-rows", 0, "-o", tmp_path / "p.jsonl")
    said = refusal(model_profile, "-mb", path, "--candidates", "Q4_0,Q8_0", "--level", "tensor", *given)
    assert "use --level fused" in said
    said = refusal(model_profile, "-mb", path, "--candidates", "Q4_0,Q8_KV", "--level", "fused", *given)
    assert "Q8_KV: has no encoder here" in said
    said = refusal(model_profile, "-mb", path, "--candidates", "Q4_0,Q4K_M", *given)
    assert "did you mean Q4_K" in said
    said = refusal(model_profile, "-mb", path, "--candidates", "2,4", "--imatrix", "x", *given)
    assert "goes with --candidates of GGUF types" in said
    (tmp_path / "r.yaml").write_text("sources: [{id: Q4_0, type: Q4_0}]\noverrides: []\nbase: {type: Q8_0}\n")
    common = ("-i", path, "-or", tmp_path / "r.yaml", "--tokenizer-from", tokenizer_file(tmp_path / "t.gguf"))
    said = refusal(model_quantize, *common, "-o", tmp_path / "mix")
    assert f" {tmp_path / 'mix'}: {tmp_path / 'r.yaml'} names types of GGUF" in said
    assert "give it a name that ends in .gguf" in said
    (tmp_path / "q.txt").write_text("blk\\.9\\.ffn=q4_0")
    common = ("-i", path, "-or", tmp_path / "q.txt", "--tokenizer-from", tmp_path / "t.gguf")
    assert "is found in no tensor name" in refusal(model_quantize, *common, "-o", tmp_path / "mix.gguf")
    made = open_checkpoint(path)
    other = Checkpoint(made.path, "x", {**made.config, "model_type": "phi9"}, made.tensors)
    with pytest.raises(UnsupportedError, match="cannot be written as GGUF"):
        make_variant(other, {"type": "Q4_0"})


def test_the_head_is_a_group_where_it_is_asked_for(tmp_path: Path) -> None:
    """Then a candidate is its own type there too; else it is what the type's file has."""
    base = open_checkpoint(write_hf(tmp_path / "hf", "llama"))
    plain, named = (
        dict(make_variants(base, [spec_of("Q4_0")], None, roles))["Q4_0"]
        for roles in (frozenset(), frozenset({"head"}))
    )
    assert isinstance(named, MadeVariant)
    assert plain.tensors["lm_head.weight"].dtype == "Q8_0"
    assert named.tensors["lm_head.weight"].dtype == "Q4_0"
    assert (
        plain.tensors["model.embed_tokens.weight"].dtype == named.tensors["model.embed_tokens.weight"].dtype == "Q4_0"
    )
    assert plain.fingerprint != named.fingerprint


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_tied_embedding_is_swapped_at_both_ends(model_type: str, tmp_path: Path) -> None:
    """Exact: the KL of the model with that tensor in all its places. Sketch: near to it."""
    base = open_checkpoint(write_hf(tmp_path / "hf", model_type, tied=True))
    ids = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(5))
    roles = frozenset({"embedding"})
    candidates = make_variants(base, [spec_of(name) for name in ("Q4_0", "Q5_0")], None, roles)
    options = ProfileOptions(level="tensor", embedding=True, match=("model.embed_tokens",))
    *_, exact = profile_exact(ProfileJob(base, "Q4_0", candidates, ids, tmp_path / "e", options))
    assert isinstance(exact, Profile)
    *_, sketch = profile_sketch(ProfileJob(base, "Q4_0", candidates, ids, tmp_path / "s", options), SketchOptions(256))
    assert isinstance(sketch, Profile)
    reference = tiny.streamed_logits(base, ids)
    for name, variant in candidates:
        swapped = SwappedSource(base, ["model.embed_tokens"], variant)
        wanted = kl_divergence(reference, tiny.streamed_logits(swapped, ids)).mean().item()
        cost, estimate = (found.cost("model.embed_tokens", str(name)) for found in (exact, sketch))
        assert cost is not None
        assert estimate is not None
        assert cost.kl_nats == pytest.approx(wanted, rel=1e-4)
        if model_type == "llama":  # the input's share alone would be 0.6 of it; gemma's draws scatter more than that
            assert estimate.kl_nats == pytest.approx(wanted, rel=0.15)
