"""model_auto: what a later stage would refuse is refused before anything is measured or written, with a plan too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import recompile
from recompile.cli import model_auto
from recompile.errors import BudgetError, RecompileError
from tests import gguf_models, tiny
from tests.commands import refusal, run

ROWS = ("-r", 2, "-l", 16, "--calibration-rows", 2, "--quiet")
BUDGET = ("-b", 4)
PLAN = pytest.mark.parametrize("plan", [(), ("--plan",)], ids=["run", "plan"])


def refused(base: Path, out: Path, *more: object) -> str:
    """What is said; nothing may be left beside the output."""
    around = out.parent if out.parent.is_dir() and len(out.name) < 200 else None
    before = sorted(around.iterdir()) if around is not None else []
    said = refusal(model_auto.main, "-i", base, "-o", out, *ROWS, *more)
    assert around is None or sorted(around.iterdir()) == before
    return said


NO_SIZE = "is not a size; write 4.2GiB, 900MiB or 4.5GB"


@PLAN
@pytest.mark.parametrize(
    ("given", "says"),
    [
        *(
            (("--size", text), f'--size "{text}" {NO_SIZE}')
            for text in ("NaN", "1e30GiB", "4,2GiB", "nanGiB", "infGiB", "GiB", " ", "0x10GiB")
        ),
        (("--size=-1GiB",), f'--size "-1GiB" {NO_SIZE}'),
        (("--size", "0.1KiB"), "--size 0.1KiB: budget 102 bytes is below what the cheapest sources take"),
        (("-b", 100), "is above what the most expensive sources take; reachable range: 2.2744 bpw to 8.2743 bpw"),
        (("-b", 0.1), "--bits 0.1: budget 0.1 bpw over quantized modules is below what the cheapest sources take"),
        (("--total-bpw", 0.5), "--total-bpw 0.5: budget 0.5 bpw over all weights is below"),
        ((*BUDGET, "--candidates", 3), "--candidates 3: one candidate leaves nothing to choose; give two or more"),
        ((*BUDGET, "--asym", "--for", "transformers"), "fail on asymmetric packed integers"),
        ((*BUDGET, "-g", "nan"), "--group-size nan: wanted a number such as 64, or channel"),
        ((*BUDGET, "-g", 7), "--group-size 7:"),
        ((*BUDGET, "-g", 999999999), "group size 999999999 does not divide its 64 columns"),
        ((*BUDGET, "--max-memory", "nan"), f'--max-memory "nan" {NO_SIZE}'),
        ((*BUDGET, "--max-memory=-5GiB"), f'--max-memory "-5GiB" {NO_SIZE}'),
        ((*BUDGET, "--max-memory", "1KiB"), "--max-memory 1024 bytes is too little: this pass needs"),
        ((*BUDGET, "-l", 1), "--length 1: wanted at least 2 tokens in a row"),
        ((*BUDGET, "--trace", "make"), "--trace make: "),
        ((*BUDGET, "--variants", "/nope"), "/nope: no such model directory"),
        ((*BUDGET, "-r", 100000), "ask for fewer or shorter rows, or give more text"),
        ((*BUDGET, "--calibration-rows", 100000), 'for the role "calibrate", and 100000 wanted'),
    ],
)
def test_values_that_no_stage_takes(
    given: tuple[object, ...], says: str, plan: tuple[str, ...], tmp_path: Path
) -> None:
    assert says in refused(tiny.base("llama-2"), tmp_path / "m", *given, *plan)


Given = Callable[[Path], tuple[object, ...]]


def variant(bits: int) -> Path:
    return tiny.variants("llama-2", (2, 3, 4))[bits]


def gguf(folder: Path) -> Path:
    return gguf_models.write_model(folder / "Q8_0.gguf")


def renamed(folder: Path) -> Path:
    """Another directory with the last name of a variant."""
    (folder / "other").mkdir()
    (folder / "other" / "3bpw").symlink_to(variant(4))
    return folder / "other" / "3bpw"


def text_of(folder: Path, text: str = "word " * 400) -> Path:
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


SOURCES: dict[str, tuple[Given, str]] = {
    "one": (lambda d: ("--variants", variant(3)), "--variants: one variant leaves nothing to choose"),
    "twice": (lambda d: ("--variants", variant(3), variant(3)), "3bpw is given twice; give every variant once"),
    "one name": (lambda d: ("--variants", variant(3), renamed(d)), "would both be source 3 of the recipe; rename one"),
    "another model": (lambda d: ("--variants", variant(3), tiny.base("gemma2")), "is not a build of the same model"),
    "two kinds": (lambda d: ("--variants", variant(2), gguf(d)), "Q8_0.gguf is a GGUF file and "),
    "tokenizer": (lambda d: ("--tokenizer-from", gguf(d)), "Q8_0.gguf: goes with GGUF types that are made"),
    "two texts": (lambda d: ("--text", text_of(d), "--dataset", "x"), "--text and --dataset exclude each other"),
    "short text": (lambda d: ("--text", text_of(d, "one two three")), "text.txt: there is text for 0 rows"),
}


@PLAN
@pytest.mark.parametrize("name", SOURCES)
def test_sources_that_do_not_go_together(name: str, plan: tuple[str, ...], tmp_path: Path) -> None:
    make, says = SOURCES[name]
    given = make(tmp_path)
    assert says in refused(tiny.base("llama-2"), tmp_path / "m", *BUDGET, *given, *plan)


OUTPUTS: dict[str, tuple[Callable[[Path], Path], tuple[object, ...], str]] = {
    "the input": (lambda d: tiny.base("llama-2"), (), "is an input ("),
    "a file of the input": (lambda d: tiny.base("llama-2") / "config.json", (), "lies inside the input"),
    "a folder in the input": (lambda d: tiny.base("llama-2") / "mix", (), "which is never written to; choose another"),
    "what holds the input": (lambda d: tiny.base("llama-2").parent, (), "holds the input"),
    "another variant": (lambda d: variant(4), (), "was not made by model_auto; move it away, or choose another --out"),
    "a device": (lambda d: Path("/dev/null"), (), "--out /dev/null: is a device or a pipe"),
    "no place": (lambda d: Path("/proc/x/y"), (), "--out /proc/x/y: cannot be written"),
    "a long name": (lambda d: d / ("x" * 260), (), "cannot be written: File name too long; choose another"),
    "a long page": (lambda d: d / ("x" * 230), (), "cannot be written: File name too long; choose another"),
    "a GGUF name": (lambda d: d / "m.gguf", (), "the candidates 2, 3, 4, 5, 6, 8 make a directory; choose another"),
    "for vllm": (lambda d: d / "m.gguf", ("--for", "vllm"), "m.gguf: is the name of a GGUF file"),
    "no GGUF name": (lambda d: d / "m", ("--for", "llama.cpp"), "give it a name that ends in .gguf"),
}


@PLAN
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be_written(name: str, plan: tuple[str, ...], tmp_path: Path) -> None:
    place, more, says = OUTPUTS[name]
    said = refused(tiny.base("llama-2"), place(tmp_path), *BUDGET, *more, *plan)
    assert says in said
    assert "remove" not in said, "it may be all that the user has of a model"


@PLAN
def test_a_variant_is_never_the_output(plan: tuple[str, ...], tmp_path: Path) -> None:
    given = ("--variants", variant(2), variant(3), *plan)
    assert "is an input (" in refused(tiny.base("llama-2"), variant(3), *BUDGET, *given)
    assert "lies inside the input" in refused(tiny.base("llama-2"), variant(2) / "m", *BUDGET, *given)


def test_the_ends_of_the_range_that_is_said_can_be_asked_for(tmp_path: Path) -> None:
    for bits in (2.2744, 8.2743):
        said = run(model_auto.main, "-i", tiny.base("llama-2"), "-o", tmp_path / "m", *ROWS, "-b", bits, "--plan")
        assert "Plan: compressed-tensors" in said
    assert not list(tmp_path.iterdir())


def test_python_is_refused_alike(tmp_path: Path) -> None:
    base, rows = tiny.base("llama-2"), {"rows": 2, "length": 16, "calibration_rows": 2}
    for call in (recompile.auto, recompile.auto_plan):
        with pytest.raises(BudgetError, match="bits 100: budget"):
            call(base, tmp_path / "m", bits=100, **rows)  # type: ignore[operator]
        with pytest.raises(RecompileError, match='size "NaN" is not a size'):
            call(base, tmp_path / "m", size="NaN", **rows)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


def test_a_plan_hashes_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes minutes for a large one."""

    def hashed(self: object) -> str:
        raise AssertionError("a plan reads headers")

    monkeypatch.setattr("recompile.checkpoint.checkpoint.Checkpoint.identity", property(hashed))
    assert recompile.auto_plan(tiny.base("llama-2"), tmp_path / "m", bits=4, rows=2, length=16, calibration_rows=2)
