"""Every file of recipes/ is applied to a small model, does what its comment promises, and is written out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.merge.overlay import Overlay, build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.recipe.recipe import Recipe, load_recipe
from tests import tiny

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))

# What each comment promises: (pattern of a module, directory); the last that matches counts, no match is the base.
PROMISES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "attention-plus-1.yaml": ((r"\.self_attn\.[qkvo]_proj", "./4bpw"),),
    "shared-experts-plus-2.yaml": ((r"\.shared_expert\.(gate|up|down)_proj", "./5bpw"),),
    "moe-experts-low.yaml": ((r"\.experts\.\d\.(gate|up|down)_proj", "./2bpw"),),
    "priority-layers.yaml": ((r"layers\.(0|1|11)\.", "./5bpw"), (r"layers\.(2|6|10)\.", "./4bpw")),
    "first-last-layers.yaml": ((r"layers\.(0|11)\.", "./6bpw"), (r"layers\.(1|10)\.", "./4bpw")),
    "mixed-group-sizes.yaml": ((r"\.(o|down)_proj", "./4bpw-g32"),),
    "down-proj-higher.yaml": ((r"\.v_proj", "./4bpw"), (r"\.down_proj", "./5bpw")),
    "rule-and-exceptions.yaml": (
        (r"\.(gate|up)_proj", "./2bpw"),
        (r"\.self_attn\.", "./4bpw"),
        (r"layers\.5\.", "./4bpw"),
        (r"layers\.0\.", "./6bpw"),
    ),
}


def variant_for(name: str, architecture: str) -> Path:
    """The tiny build that a directory name stands for: `4bpw`, `4bpw-g64`."""
    found = re.fullmatch(r"(\d)bpw(?:-g(\d+))?", Path(name).name)
    assert found, f"{name}: call variants 4bpw or 4bpw-g64, so that this test can build them"
    bits, group_size = int(found[1]), int(found[2] or tiny.GROUP_SIZE)
    return tiny.variants(architecture, (bits,), group_size=group_size)[bits]


def architecture_for(recipe: Recipe) -> str:
    """A dense or MoE model with the layers that the recipe names."""
    keys = [override.key for override in recipe.overrides]
    layers = max([int(number) for key in keys for number in re.findall(r"\.layers\.(\d+)\.", f".{key}")], default=1)
    kind = "qwen2-moe" if any("expert" in key for key in keys) else "llama"
    return f"{kind}-{layers + 1}"


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def applied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Overlay:
    """A recipe applied, with its directories in the working directory under the names that it uses."""
    path: Path = request.param
    recipe = load_recipe(path)
    assert isinstance(recipe.base, str), "say what the recipe is meant to be applied to: base: ./3bpw"
    architecture = architecture_for(recipe)
    monkeypatch.chdir(tmp_path)
    for name in {recipe.base, *(source.model_dir for source in recipe.sources)}:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(variant_for(name, architecture))
    return build_overlay(open_checkpoint(recipe.base), recipe)


def test_each_module_comes_from_where_the_comment_says(applied: Overlay) -> None:
    assert applied.recipe is not None
    file = Path(applied.recipe.name).name
    if file not in PROMISES:
        assert applied.recipe.provenance, f"{file}: add what it promises to PROMISES"
        promises = [  # made by model_optimize: a line a module, none competing
            (re.escape(override.key.removesuffix(".*")) + "$", source.model_dir)
            for override in applied.recipe.overrides
            for source in applied.recipe.sources
            if source.id == override.source
        ]
        assert not any("*" in override.key.removesuffix(".*") for override in applied.recipe.overrides)
    else:
        promises = list(PROMISES[file])
    used = set()
    for name, placement in applied.placements.items():
        wanted = None
        if placement.stored.is_quantized:
            wanted = next((where for pattern, where in reversed(promises) if re.search(pattern, name)), None)
            assert placement.source == wanted, name
        if placement.source is not None:
            used.add(placement.source)
            for info in placement.stored.parts.values():
                assert applied.sources[placement.source].path in info.path.parents
    assert used == {source.model_dir for source in applied.recipe.sources}, "a source that nothing is taken from"


def test_no_line_is_idle(applied: Overlay) -> None:
    assert applied.warnings == ()


def test_it_is_written(applied: Overlay, tmp_path: Path) -> None:
    for _ in execute(plan_write(applied, tmp_path / "out")):
        pass
    written = open_checkpoint(tmp_path / "out")
    assert written.modules.keys() == applied.placements.keys()
    for name, placement in applied.placements.items():
        assert written.modules[name].parts.keys() == placement.stored.parts.keys()
        for part, info in placement.stored.parts.items():
            assert written.read_bytes(written.modules[name].parts[part]) == placement.checkpoint.read_bytes(info), name
            assert written.modules[name].parts[part].shape == info.shape
    for name, module in written.modules.items():
        if module.is_quantized:  # the merged config finds each module's own scheme
            assert written.scheme(module) == applied.placements[name].checkpoint.scheme(applied.placements[name].stored)
    assert build_overlay(written, None).accounting.total_bits == applied.accounting.total_bits


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_recipe_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert re.search(rf"recompile -i \S+ -o \S+ -or \S*{re.escape(path.name)}", text), "how to apply it"
    recipe = load_recipe(path)
    assert recipe.warnings == ()
    if not recipe.provenance:
        assert all(source.model_dir.startswith("./") for source in recipe.sources)
        assert f"recompile -i {str(recipe.base).removeprefix('./')} " in text


def test_the_table_names_every_file() -> None:
    table = (FOLDER / "README.md").read_text()
    assert len(FILES) >= 6
    for path in FILES:
        assert f"| [{path.name}]({path.name}) |" in table
        assert re.search(rf"`recompile -i \S+ -o \S+ -or recipes/{re.escape(path.name)}`", table)
    named = set(re.findall(r"\[(\S+\.yaml)\]", table))
    assert named == {path.name for path in FILES}


def test_promises_are_of_files_that_exist() -> None:
    assert set(PROMISES) <= {path.name for path in FILES}
