"""A recipe meets checkpoints: which source holds which module, what is refused, and what the mix weighs."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.module_names import role_of
from recompile.errors import MismatchError, MissingWeight, RecipeError
from recompile.merge.overlay import Overlay, account, build_overlay, check_shapes, quantizable
from recompile.recipe.recipe import load_recipe
from tests import tiny


class Mixer:
    """The tiny variants, and recipes over them by bits."""

    def __init__(self, folder: Path, found: dict[int, Path]) -> None:
        self.folder, self.found = folder, found
        self.base = open_checkpoint(found[3])

    def recipe(self, *lines: tuple[str, object], sources: dict[Any, Path | str] | None = None) -> Path:
        """Lines of (key, source); the first override stands on line 3 + number of sources."""
        known = sources if sources is not None else {n: path for n, path in self.found.items() if n != 3}
        text = "sources:\n" + "".join(f"  - {{id: {n}, model_dir: '{where}'}}\n" for n, where in known.items())
        text += ("overrides:\n" if lines else "overrides: []\n") + "".join(
            f"  - {{key: '{key}', source: {source}}}\n" for key, source in lines
        )
        path = self.folder / "mix.yaml"
        path.write_text(text)
        return path

    def overlay(self, *lines: tuple[str, object], **options: Any) -> Overlay:
        return build_overlay(self.base, self.recipe(*lines), **options)

    def bits_of(self, overlay: Overlay) -> dict[str, int]:
        """The variant that each module is taken from; 3 is the base."""
        names = {str(path): n for n, path in self.found.items()}
        return {name: 3 if p.source is None else names[p.source] for name, p in overlay.placements.items()}


@pytest.fixture
def mixer(tmp_path: Path) -> Mixer:
    return Mixer(tmp_path, tiny.variants("llama", (2, 3, 4, 6)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the 4-bit variant that may be damaged."""
    return tiny.copy_of(tiny.variants("llama", (2, 3, 4, 6))[4], tmp_path / "copy")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / "model.safetensors")


# ---- resolution ------------------------------------------------------------------------------------------------------


def test_without_a_recipe_everything_is_the_base(mixer: Mixer) -> None:
    overlay = build_overlay(mixer.base, None)
    assert overlay.placements.keys() == mixer.base.modules.keys()
    assert overlay.overridden == 0
    assert overlay.sources == {}
    assert all(
        p.checkpoint is mixer.base and p.source is None and p.override is None for p in overlay.placements.values()
    )
    assert overlay.label == mixer.base.label
    assert overlay.config == mixer.base.config


def test_an_empty_recipe_is_a_plain_copy(mixer: Mixer) -> None:
    overlay = mixer.overlay()
    assert overlay.overridden == 0
    assert overlay.modules == mixer.base.modules


def test_whole_modules_move(mixer: Mixer) -> None:
    overlay = mixer.overlay(("model.layers.2.mlp.*", 4), ("*.v_proj.*", 6))
    bits = mixer.bits_of(overlay)
    for name, found in bits.items():
        wanted = 6 if name.endswith("v_proj") else 4 if name.startswith("model.layers.2.mlp.") else 3
        assert found == wanted, name
        placement = overlay.placements[name]
        assert placement.stored is placement.checkpoint.modules[name]
        assert placement.stored.parts.keys() == open_checkpoint(mixer.found[found]).modules[name].parts.keys()
    assert overlay.overridden == 3 + 4
    four = overlay.placements["model.layers.2.mlp.up_proj"]
    assert four.override is not None
    assert (four.override.key, four.override.line) == ("model.layers.2.mlp.*", 6)
    assert overlay.warnings == ()


def test_what_is_loaded_is_what_was_placed(mixer: Mixer) -> None:
    overlay = mixer.overlay(("model.layers.1.*", 4))
    for n, name in ((4, "model.layers.1.mlp.up_proj.weight"), (3, "model.layers.0.mlp.up_proj.weight")):
        assert torch.equal(overlay.load(name), open_checkpoint(mixer.found[n]).load(name))
    assert overlay.has("model.layers.1.mlp.up_proj.weight")
    assert not overlay.has("model.layers.1.mlp.up_proj.bias")
    assert not overlay.has("model.layers.9.mlp.up_proj.weight")
    with pytest.raises(MissingWeight):
        overlay.load("model.layers.9.mlp.up_proj.weight")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_modules_resolve_as_their_tensors_do(data: st.DataObject) -> None:
    """Against the recipe's own resolver, tensor by tensor, for keys that name whole modules or layers."""
    found = tiny.variants("llama", (2, 3, 4, 6))
    base = open_checkpoint(found[3])
    keys = st.sampled_from(
        [
            "*",
            "*.self_attn.*",
            "*.mlp.*",
            "*_proj.*",
            "*.down_proj.*",
            "model.layers.0.*",
            "model.layers.1.mlp.*",
            "*.layers.2.*",
            "lm_head.*",
            "model.layers.3.self_attn.v_proj.*",
            "*norm*",
        ]
    )
    lines = data.draw(st.lists(st.tuples(keys, st.sampled_from([2, 4, 6])), min_size=1, max_size=6))
    text = "sources:\n" + "".join(f"  - {{id: {n}, model_dir: '{found[n]}'}}\n" for n in (2, 4, 6))
    text += "overrides:\n" + "".join(f"  - {{key: '{key}', source: {source}}}\n" for key, source in lines)
    path = found[3].parent / "drawn.yaml"
    path.write_text(text)
    overlay, recipe = build_overlay(base, path), load_recipe(path)
    assert overlay.placements.keys() == base.modules.keys()
    for name, placement in overlay.placements.items():
        directories = {recipe.source_dir(info.name) for info in base.modules[name].parts.values()}
        assert directories == {placement.source}
        assert placement.checkpoint.label == (placement.source or base.label)


def test_parts_from_several_places_are_refused(mixer: Mixer) -> None:
    with pytest.raises(RecipeError) as caught:
        mixer.overlay(("model.layers.0.mlp.*", 4), ("model.layers.2.mlp.up_proj.weight_scale", 6))
    said = str(caught.value)
    assert re.search(r"mix\.yaml:7: parts of model\.layers\.2\.mlp\.up_proj would come from different places", said)
    assert f"model.layers.2.mlp.up_proj.weight_scale from {mixer.found[6]}" in said
    assert "from the base" in said
    assert 'write "model.layers.2.mlp.up_proj.*"' in said


def test_parts_from_two_sources_are_refused(mixer: Mixer) -> None:
    with pytest.raises(RecipeError, match=r"parts of model\.layers\.2\.mlp\.up_proj"):
        mixer.overlay(("model.layers.2.mlp.up_proj.*", 4), ("model.layers.2.mlp.up_proj.weight_packed", 6))


def test_a_key_that_matches_nothing_is_an_error_with_a_suggestion(mixer: Mixer) -> None:
    with pytest.raises(RecipeError) as caught:
        mixer.overlay(("*.mlp.*", 4), ("model.layers.2.self_attn.q_proj", 6), ("model.layers.3.mpl.*", 4))
    first, second = str(caught.value).splitlines()
    assert first == (
        f'{mixer.folder}/mix.yaml:7: overrides[1].key "model.layers.2.self_attn.q_proj" matches no tensor; '
        'did you mean "model.layers.2.self_attn.q_proj.*"?'
    )
    assert 'mix.yaml:8: overrides[2].key "model.layers.3.mpl.*" matches no tensor; did you mean' in second
    assert second.endswith("(allow_unmatched goes on without it)")


def test_allow_unmatched_goes_on_and_says_so(mixer: Mixer) -> None:
    overlay = mixer.overlay(("*.mlp.*", 4), ("model.layers.99.*", 6), allow_unmatched=True)
    assert set(mixer.bits_of(overlay).values()) == {3, 4}
    (warning,) = overlay.warnings
    assert 'mix.yaml:7: overrides[1].key "model.layers.99.*" matches no tensor' in warning


def test_a_line_that_never_decides_is_a_warning(mixer: Mixer) -> None:
    overlay = mixer.overlay(("model.layers.1.mlp.*", 2), ("model.layers.1.*", 4))
    (warning,) = overlay.warnings
    assert re.search(
        r'mix\.yaml:6: "model\.layers\.1\.mlp\.\*" never decides: .* taken by "model\.layers\.1\.\*" on line 7', warning
    )
    assert mixer.bits_of(overlay)["model.layers.1.mlp.up_proj"] == 4


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist_is_named_with_its_line(mixer: Mixer) -> None:
    path = mixer.recipe(("*.mlp.*", 9), sources={4: mixer.found[4], 9: "no/such/9bpw"})
    with pytest.raises(RecipeError, match=r'mix\.yaml:3: sources\[1\]\.model_dir: "no/such/9bpw" does not exist'):
        build_overlay(mixer.base, path)


def test_directories_beside_the_recipe_are_found_and_told(
    mixer: Mixer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "4bpw").symlink_to(mixer.found[4])
    path = mixer.recipe(("*.mlp.*", 4), sources={4: "./4bpw"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    overlay = build_overlay(mixer.base, path)
    assert any("taken beside the recipe" in warning for warning in overlay.warnings)
    monkeypatch.chdir(tmp_path)
    assert build_overlay(mixer.base, path).warnings == ()


def test_a_source_that_is_no_checkpoint_is_named(mixer: Mixer, tmp_path: Path) -> None:
    (tmp_path / "4bpw").mkdir()
    path = mixer.recipe(("*.mlp.*", 4), sources={4: tmp_path / "4bpw"})
    with pytest.raises(Exception, match=r"4bpw: not a model directory"):
        build_overlay(mixer.base, path)


def test_sources_that_no_line_uses_are_not_opened(mixer: Mixer) -> None:
    path = mixer.recipe(("*.mlp.*", 4), sources={4: mixer.found[4], 9: "no/such/9bpw"})
    assert list(build_overlay(mixer.base, path).sources) == [str(mixer.found[4])]


def test_one_directory_under_two_spellings_is_opened_once(mixer: Mixer) -> None:
    other = f"{mixer.found[4].parent}/./4bpw"
    path = mixer.recipe(("*.mlp.*", 4), ("*.self_attn.*", 5), sources={4: mixer.found[4], 5: other})
    overlay = build_overlay(mixer.base, path)
    assert list(overlay.sources) == [str(mixer.found[4]), other]
    first, second = overlay.sources.values()
    assert first is second
    assert overlay.overridden == 28


def test_the_base_may_be_a_source(mixer: Mixer) -> None:
    """To take back what another line gives: the directory first mentioned last wins."""
    path = mixer.recipe(("*.mlp.*", 4), ("model.layers.0.*", 3), sources={4: mixer.found[4], 3: mixer.found[3]})
    bits = mixer.bits_of(build_overlay(mixer.base, path))
    assert bits["model.layers.0.mlp.up_proj"] == 3
    assert bits["model.layers.1.mlp.up_proj"] == 4


def test_a_source_without_a_module_is_named_with_the_line_that_asks(mixer: Mixer, copy: Path) -> None:
    name = "model.layers.2.mlp.up_proj"
    edit_tensors(copy, {f"{name}.{part}": None for part in ("weight_packed", "weight_scale", "weight_shape")})
    path = mixer.recipe(("model.layers.2.*", 4), sources={4: copy})
    with pytest.raises(
        MissingWeight, match=rf"mix\.yaml:4: {copy} has no module {name}, which key .model\.layers\.2\.\*"
    ):
        build_overlay(mixer.base, path)


def test_modules_that_only_a_source_has_come_when_asked_for(mixer: Mixer, copy: Path) -> None:
    edit_tensors(copy, {"lm_head.weight": None, "extra_head.weight": torch.ones(4, 4)})
    path = mixer.recipe(("extra_head.*", 4), ("model.layers.0.*", 4), sources={4: copy})
    overlay = build_overlay(mixer.base, path)
    assert overlay.placements["extra_head"].source == str(copy)
    assert torch.equal(overlay.load("extra_head.weight"), torch.ones(4, 4))
    assert overlay.placements["lm_head"].source is None
    path = mixer.recipe(("model.layers.0.*", 4), sources={4: copy})
    assert "extra_head" not in build_overlay(mixer.base, path).placements


def test_the_key_set_of_a_module_is_its_sources(mixer: Mixer, copy: Path) -> None:
    """A dense module replaced by a packed one, and a bias that only the source has."""
    name = "model.layers.2.mlp.up_proj"
    edit_tensors(copy, {f"{name}.bias": torch.zeros(128)})
    dense = open_checkpoint(tiny.base("llama"))
    overlay = build_overlay(dense, mixer.recipe((f"{name}.*", 4), sources={4: copy}))
    assert set(overlay.modules[name].parts) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert overlay.formats == ("pack-quantized",)
    back = build_overlay(open_checkpoint(copy), mixer.recipe((f"{name}.*", 16), sources={16: tiny.base("llama")}))
    assert set(back.modules[name].parts) == {"weight"}


def test_a_head_that_only_the_source_stores_unties_the_model(tmp_path: Path) -> None:
    found, headed = tiny.variants("llama-tied", (3,)), tiny.variants("llama-tied", (4,), head_bits=6)
    mixer = Mixer(tmp_path, {3: found[3], 4: headed[4]})
    overlay = mixer.overlay(("lm_head.*", 4))
    assert overlay.config["tie_word_embeddings"] is False
    assert mixer.base.config["tie_word_embeddings"] is True
    assert overlay.accounting.head_bpw == pytest.approx(6.5, abs=0.02)
    assert mixer.overlay(("model.layers.0.*", 4)).config["tie_word_embeddings"] is True


# ---- same model ------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(mixer: Mixer) -> None:
    path = mixer.recipe(("*.mlp.*", 4), sources={4: tiny.variants("llama-2", (3,))[3]})
    with pytest.raises(MismatchError, match=r"mix\.yaml:2: .*num_hidden_layers in config\.json is 2, wanted 4"):
        build_overlay(mixer.base, path)


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "vocab_size", "num_attention_heads"])
def test_every_field_of_identity_counts(mixer: Mixer, copy: Path, field: str) -> None:
    edit_config(copy, **{field: 77})
    with pytest.raises(MismatchError, match=f"{field} in config.json is 77, wanted"):
        build_overlay(mixer.base, mixer.recipe(("*.mlp.*", 4), sources={4: copy}))


def test_another_tokenizer_is_refused(mixer: Mixer, copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert build_overlay(mixer.base, mixer.recipe(("*.mlp.*", 4), sources={4: copy})).overridden, "none says nothing"
    tiny.write_tokenizer(copy, first=1)
    with pytest.raises(MismatchError, match=r"mix\.yaml:2: .* has another tokenizer than"):
        build_overlay(mixer.base, mixer.recipe(("*.mlp.*", 4), sources={4: copy}))


def test_another_shape_is_refused(mixer: Mixer, copy: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight_shape"
    edit_tensors(copy, {name: torch.tensor([64, 128])})
    with pytest.raises(
        MismatchError, match=r"model\.layers\.2\.mlp\.up_proj is \[64, 128\], in .*3bpw it is \[128, 64\]"
    ):
        build_overlay(mixer.base, mixer.recipe(("*.mlp.*", 4), sources={4: copy}))


def test_padded_shapes_are_the_same_and_others_are_not(tmp_path: Path) -> None:
    def stored(fmt: str, *shape: int) -> Any:
        parts = {
            "dense": {"weight": torch.zeros(shape)},
            "exl3": {
                "trellis": torch.zeros(shape[1] // 16, shape[0] // 16, 48, dtype=torch.int16),
                "suh": torch.zeros(shape[1], dtype=torch.float16),
                "svh": torch.zeros(shape[0], dtype=torch.float16),
            },
            "exl2": {
                "q_weight": torch.zeros(2, shape[0], dtype=torch.int32),
                "q_invperm": torch.zeros(shape[1], dtype=torch.int16),
                "q_scale": torch.zeros(1, shape[0] // 8, dtype=torch.int32),
                "q_scale_max": torch.zeros(1, dtype=torch.float16),
                "q_groups": torch.zeros(2, dtype=torch.int16),
            },
        }[fmt]
        folder = tmp_path / f"{fmt}{shape}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({f"m.{part}": value for part, value in parts.items()}, folder / "model.safetensors")
        return open_checkpoint(folder).modules["m"]

    check_shapes("m", stored("dense", 100, 64), stored("exl3", 128, 128), "base", "other")
    check_shapes("m", stored("dense", 100, 64), stored("exl2", 128, 64), "base", "other")
    check_shapes("m", stored("exl2", 128, 64), stored("exl3", 128, 128), "base", "other")
    for one, other in (
        (stored("dense", 100, 64), stored("dense", 128, 64)),
        (stored("dense", 100, 64), stored("exl3", 256, 128)),
        (stored("dense", 100, 64), stored("exl2", 160, 64)),
    ):
        with pytest.raises(MismatchError, match="m is"):
            check_shapes("m", one, other, "base", "other")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def packed_bits(shape: tuple[int, int], bits: int) -> int:
    """Codes, a bf16 scale for 32 weights, and two int64 sizes."""
    out, width = shape
    return out * width * bits + out * (width // 32) * 16 + 128


def test_accounting_is_exact(mixer: Mixer) -> None:
    overlay = mixer.overlay(("model.layers.0.*", 6), ("*.down_proj.*", 2))
    shapes = {f"self_attn.{n}_proj": (s, 64) for n, s in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
    shapes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    bits = weights = 0
    for layer in range(4):
        for name, shape in shapes.items():
            # 2bpw is first mentioned after 6bpw, so its line wins in layer 0 too
            rate = 2 if name == "mlp.down_proj" else 6 if layer == 0 else 3
            bits += packed_bits(shape, rate)
            weights += shape[0] * shape[1]
    size = overlay.accounting
    assert (size.quantized_bits, size.quantized_weights) == (bits, weights)
    assert size.bpw == float(Fraction(bits, weights))
    assert (size.head_weights, size.head_bits, size.head_bpw) == (256 * 64, 16 * 256 * 64, 16.0)
    assert (size.embedding_weights, size.embedding_bits, size.embedding_bpw) == (256 * 64, 16 * 256 * 64, 16.0)
    assert (size.other_weights, size.other_bits) == (9 * 64, 16 * 9 * 64)  # two norms a layer and the last
    assert size.total_bits == bits + 16 * (2 * 256 * 64 + 9 * 64)
    assert size.total_bits == 8 * sum(module.size_bytes for module in overlay.modules.values())
    assert size.total_bytes == size.total_bits // 8
    assert size.total_gib == size.total_bytes / 2**30
    assert size.total_bpw == size.total_bits / size.total_weights
    assert set(size.as_dict()) >= {"bpw", "head_bpw", "embedding_bpw", "total_bpw", "total_bytes", "total_gib"}


def test_accounting_of_a_plain_variant_is_that_of_its_files(mixer: Mixer) -> None:
    for found in (*mixer.found.values(), tiny.base("llama")):
        checkpoint = open_checkpoint(found)
        size = build_overlay(checkpoint, None).accounting
        assert size.total_bytes == checkpoint.size_bytes
        assert size.total_bytes == sum(
            v.numel() * v.element_size() for v in load_file(found / "model.safetensors").values()
        )


def test_a_module_taken_dense_counts_at_its_dense_size(mixer: Mixer) -> None:
    """Else bits per weight would fall when a module is left unquantized."""
    plain = build_overlay(mixer.base, None).accounting
    path = mixer.recipe(("model.layers.1.mlp.up_proj.*", 16), sources={16: tiny.base("llama")})
    mixed = build_overlay(mixer.base, path).accounting
    assert mixed.quantized_weights == plain.quantized_weights
    assert mixed.quantized_bits - plain.quantized_bits == 16 * 128 * 64 - packed_bits((128, 64), 3)


def test_dense_models_have_bits_per_weight_too() -> None:
    size = build_overlay(open_checkpoint(tiny.base("llama")), None).accounting
    assert size.bpw == 16.0
    assert size.quantized_weights == 4 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64)


def test_a_tied_model_has_no_head_of_its_own() -> None:
    size = build_overlay(open_checkpoint(tiny.base("llama-tied")), None).accounting
    assert size.head_bpw is None
    assert size.embedding_bpw == 16.0


def test_roles() -> None:
    roles = {"lm_head": "head", "output": "head", "model.embed_tokens": "embedding", "token_embd": "embedding"}
    roles |= {"model.layers.0.mlp.up_proj": "layer", "model.norm": "layer", "transformer.wte": "embedding"}
    for name, role in roles.items():
        assert role_of(name) == role, name


def test_routers_do_not_count_as_quantized(tmp_path: Path) -> None:
    found = open_checkpoint(tiny.variants("qwen2-moe", (3,))[3])
    counted = quantizable([found])
    assert "model.layers.0.mlp.experts.3.gate_proj" in counted
    assert "model.layers.0.mlp.gate" not in counted
    assert "lm_head" not in counted
    size = account(found.modules.values(), counted)
    assert size.total_bits == 8 * found.size_bytes


def test_notes_of_the_checkpoints_are_warnings(mixer: Mixer, copy: Path) -> None:
    save_file({"stray.weight": torch.zeros(1)}, copy / "old.safetensors")
    overlay = build_overlay(mixer.base, mixer.recipe(("*.mlp.*", 4), sources={4: copy}))
    (warning,) = overlay.warnings
    assert "ignored old.safetensors" in warning
