"""The Python API: docs/python-api.md runs as it stands, without click; names are loaded late; errors name arguments."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recompile
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import load_profile
from recompile.errors import RecompileError
from recompile.events import Progress
from recompile.io.sizes import size_bytes
from recompile.merge.overlay import Overlay, build_overlay
from recompile.optimize.solvers import SOLVERS
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "python-api.md"
STEPS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's steps left, all run in one process."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "base").symlink_to(tiny.base("llama-2"))
    late = "import sys; import recompile; assert not {'torch', 'transformers', 'click'} & sys.modules.keys()\n"
    free = "\nassert not {'click', 'rich'} & sys.modules.keys(), 'a function of the library imports them'\n"
    (folder / "page.py").write_text(late + "\n".join(STEPS) + free)
    found = subprocess.run([sys.executable, "page.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    (folder / "said.txt").write_text(found.stdout)
    return folder


def test_the_page_runs_and_says_what_it_shows(folder: Path) -> None:
    said = (folder / "said.txt").read_text()
    assert "variants/3bpw: 3.524 bpw" in said  # with a scale of 16 bits for 32 weights, and the shape
    assert re.search(r"bpw, predicted KL 0\.\d{4}, measured 0\.\d+ ± 0\.\d+", said)
    assert re.search(r"^uniform 3 0\.\d+", said, re.MULTILINE)
    assert "comparing: 8 of 8 steps logits of row 4" in said
    assert "give one of bits, total_bpw, size, max_kl and max_ppl_increase" in said, "errors name arguments"


def test_every_step_fits_on_a_hand() -> None:
    assert len(STEPS) >= 8
    for step in STEPS:
        assert len(step.splitlines()) <= 15, step


def test_a_choice_and_its_recipe_place_every_tensor_alike(folder: Path) -> None:
    """One resolver: what a search measured is what the written file makes."""
    profile = load_profile(folder / "profile.jsonl")
    header = profile.header
    checkpoints = {c.label: open_checkpoint(folder / c.model_dir) for c in header.candidates}
    report = recompile_again(folder)
    chosen = Overlay.of_choice(header, checkpoints, report)
    base = open_checkpoint(folder / header.candidate(header.base).model_dir)
    written = build_overlay(base, folder / "overrides.yaml")
    assert len(set(report.values())) > 1
    assert chosen.placements.keys() == written.placements.keys()
    for module, placement in chosen.placements.items():
        other = written.placements[module]
        assert placement.stored.parts.keys() == other.stored.parts.keys(), module
        for part, tensor in placement.stored.parts.items():
            there = other.stored.parts[part]
            assert tensor.name == there.name
            assert Path(tensor.path).resolve() == Path(there.path).resolve(), module
            assert (tensor.offset, tensor.size_bytes) == (there.offset, there.size_bytes)
    assert chosen.accounting == written.accounting


def recompile_again(folder: Path) -> dict[str, str]:
    """The choice behind overrides.yaml, from the profile: the exact solver gives it again."""
    from recompile.optimize.budget import Budget
    from recompile.optimize.choose import choose

    solution = choose(load_profile(folder / "profile.jsonl"), Budget(bpw=4.0), "exact").solution
    return dict(solution.choice)


def test_an_interrupted_call_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle, made again: only what is missing is measured."""
    monkeypatch.chdir(folder)
    seen: list[Progress] = []

    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.what == "profiling":
            seen.append(event)
            if event.done >= event.total / 2:
                raise KeyboardInterrupt

    arguments = ("base", "variants/3bpw", ["variants/4bpw"], "again.jsonl")
    with pytest.raises(KeyboardInterrupt):
        recompile.profile(*arguments, rows=2, length=16, on_event=stop)
    half, total = len(seen), seen[-1].total
    whole = recompile.profile(*arguments, rows=2, length=16, on_event=seen.append)
    assert not whole.missing()
    again = [event for event in seen[half:] if isinstance(event, Progress) and event.what == "profiling"]
    assert 0 < len(again) < total


@pytest.mark.parametrize("name", recompile.API)
def test_every_verb_has_an_example_and_is_found_late_and_early(name: str) -> None:
    verb = recompile.load_verb(name)
    assert re.search(rf"^ {{4,}}.*recompile\.{name}\(", verb.__doc__, re.MULTILINE), f"{name} shows no example"
    assert callable(getattr(recompile, name)), "also after the room of the same name was imported"
    assert inspect.signature(getattr(recompile, name)) == inspect.signature(verb)
    parameters = inspect.signature(verb).parameters.values()
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters), "plain arguments"


def test_what_two_verbs_share_is_checked_and_named_as_their_own() -> None:
    both = [inspect.signature(verb).parameters for verb in (recompile.optimize, recompile.frontier)]
    shared = both[0].keys() & both[1].keys()
    assert len(shared) == 21
    assert {name for name in shared if both[0][name] != both[1][name]} == {"solver"}  # refine walks no grid
    for verb, name, given in (
        (recompile.optimize, "optimize", ["p"]),
        (recompile.frontier, "frontier", ["p", "3:4:1"]),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'pins'$"):
            verb(*given, pins=["*=4"])
        with pytest.raises(RecompileError, match=r'^pin "x": wanted GLOB=ID'):
            verb(*given, pin=["x"])


def test_a_verb_is_callable_whatever_was_imported_first() -> None:
    code = (
        "import recompile.quantize.encoders, recompile.optimize.choose, recompile.merge.overlay, recompile.auto\n"
        "import recompile\n"
        "from recompile.errors import ArgumentError\n"
        "for call in (lambda: recompile.quantize('x', 'y'), lambda: recompile.merge('x'),\n"
        "             lambda: recompile.auto('x', 'y')):\n"
        "    try: call()\n"
        "    except ArgumentError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [
        "wanted bits with bitrates, scheme with names, or recipe with a file for one mix",
        "out is needed, or dry_run",
        "give one budget: bits 3.5, total_bpw 4 or size 4.2GiB",
    ]


def test_messages_name_arguments_or_flags() -> None:
    error = RecompileError("{rtol} adds rows, and {rows} 16 fixes them; {unknown thing} stays")
    assert str(error) == "rtol adds rows, and rows 16 fixes them; {unknown thing} stays"
    assert error.spelled({"rtol": "--rtol", "rows": "-r"}).startswith("--rtol adds rows, and -r 16")


def test_the_table_of_solvers_names_what_is_there() -> None:
    for solver in SOLVERS.values():
        assert callable(solver.load())
        assert solver.function.startswith("eval.") == solver.runs_models


def test_sizes_are_numbers_or_text() -> None:
    assert (size_bytes(5), size_bytes("1KiB"), size_bytes(None)) == (5, 1024, None)
