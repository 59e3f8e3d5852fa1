"""Every file that a run goes on from, damaged: the run ends with the same result, or stops by the file's name.

Each run is killed (SIGKILL) in a fork as soon as all of its files are there. Then one of them is damaged and the run
started again in this process.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import recompile
from eval.heal import heal
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import load_profile
from recompile.errors import RecompileError
from tests import tiny, traces
from tests.eval.test_heal import OPTIONS, make_build
from tests.eval.test_heal import make_rows as heal_rows
from tests.hostile.test_kills import TEXT, weights_of
from tests.quantize.test_gguf_variants import tokenizer_file, write_hf

Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class Run:
    """files: those that it goes on from, by where they stand in its folder; run: begins or goes on in that folder,
    other: as another run; results: what has to be the same, by name; after: writes that reach the disk after all files
    are there."""

    files: tuple[str, ...]
    run: Callable[[Path, Inputs, bool], object]
    results: Callable[[Path], Mapping[str, object]]
    after: int = 1


def profile(mode: str, architecture: str = "llama-2", **how: object) -> Callable[[Path, Inputs, bool], object]:
    def run(d: Path, inputs: Inputs, other: bool) -> object:
        variants, rows = tiny.variants(architecture, (3, 4)), inputs["other ids" if other else "ids"]
        return recompile.profile(
            tiny.base(architecture), str(variants[4]), [str(variants[3])], d / "p.jsonl", mode=mode, input_ids=rows,
            **{"level": "layer", "samples": 16, "length": 16, **how},
        )  # fmt: skip

    return run


def refine(d: Path, inputs: Inputs, other: bool) -> object:
    rows = {"rows": 3, "length": 16, "text": inputs["text"]}
    return recompile.optimize(
        inputs["profile"], d / "mix.yaml", bits=4.2 if other else 4.1, check=False, guard=False, steps=2,
        solver="refine", **rows,
    )  # fmt: skip


def auto(d: Path, inputs: Inputs, other: bool) -> object:
    rows = {"rows": 2, "length": 16, "text": inputs["text"], "calibration_rows": 2}
    return recompile.auto(
        tiny.base("llama-2"), d / "m", bits=4.2 if other else 4.1, candidates=["3", "4"], group_size=tiny.GROUP_SIZE,
        samples=2, level="layer", solver="exact", verify=False, **rows,
    )  # fmt: skip


def variants(d: Path, inputs: Inputs, other: bool) -> object:
    rows = {"rows": None, "input_ids": inputs["other ids" if other else "ids"]}
    return recompile.quantize(tiny.base("llama-2"), d / "v", bits=[3], group_size=tiny.GROUP_SIZE, **rows)


def compensated(d: Path, inputs: Inputs, other: bool) -> object:
    how = {"rows": None, "input_ids": inputs["other ids" if other else "ids"], "compensate": True}
    return recompile.quantize(tiny.base("llama-2"), d / "v", bits=[3], group_size=tiny.GROUP_SIZE, **how)


def two_sided(d: Path, inputs: Inputs, other: bool) -> object:
    how = {"rows": None, "input_ids": inputs["other ids" if other else "ids"], "rounding": "two-sided"}
    return recompile.quantize(tiny.base("llama-2"), d / "v", bits=[3], group_size=tiny.GROUP_SIZE, **how)


def gguf(d: Path, inputs: Inputs, other: bool) -> object:
    how = {"importance": False, "tokenizer_from": inputs["tokens"]}
    return recompile.quantize(inputs["other hf" if other else "hf"], d / "v", bits=["Q4_0"], format="gguf", **how)


def healing(d: Path, inputs: Inputs, other: bool) -> object:
    rows = heal_rows(20) if other else heal_rows()
    *_, report = heal(open_checkpoint(inputs["build"]), open_checkpoint(tiny.base("llama-2")), d / "H", rows, OPTIONS)
    return report


def trace(d: Path, inputs: Inputs, other: bool) -> object:
    how = {"prompts": inputs["prompts"], "rows": 8, "tokens": 6, "batch_size": 2, "temperature": 0.5}
    return recompile.trace(traces.model(), d / "t.safetensors", seed=int(other), **how)


def file_of(*names: str) -> Callable[[Path], Mapping[str, object]]:
    return lambda d: {name: (d / name).read_bytes() for name in names}


def costs_of(d: Path) -> Mapping[str, object]:
    found = load_profile(d / "p.jsonl")
    return {"costs": found.measurements, "control": found.control}


def chosen(d: Path) -> Mapping[str, object]:
    return {"overrides": (d / "mix.yaml").read_text().partition("overrides:")[2]}


def gguf_file(d: Path) -> Mapping[str, object]:
    (path,) = (d / "v").glob("*.gguf")
    return {path.name: path.read_bytes()}


SWEEPS = ("p.jsonl", "p.jsonl.sweeps/sweep-0000.safetensors")
RUNS = {
    "exact": Run(("p.jsonl",), profile("exact"), file_of("p.jsonl"), after=3),
    "sketch": Run(SWEEPS, profile("sketch"), costs_of),
    "hybrid": Run(("p.jsonl.exact.jsonl",), profile("hybrid", bits=4.1, minutes=60), costs_of, after=2),
    "rows": Run(("p.jsonl.rows/00000-00004.jsonl",), profile("exact", rows="auto", max_rows=4), costs_of, after=4),
    "mixes": Run(
        ("p.jsonl.mixes.json",), profile("sketch", "qwen3-moe", samples=2, level="block"), file_of("p.jsonl"), after=0
    ),
    "refine": Run(("mix.refine.jsonl", "mix.mixes.json"), refine, chosen, after=3),
    "auto": Run(
        ("m.work/auto.json", "m.work/overrides.yaml", "m.work/profile.jsonl",
         "m.work/profile.jsonl.rounded/3bpw/model.safetensors"),
        auto, lambda d: weights_of(d / "m"), after=4,
    ),
    "variants": Run(
        tuple(f"v/3bpw.building/{name}" for name in (
            ".quantize_journal.json", "stage-00000.safetensors", ".scaled-00000.json", ".stage-00000.json"
        )),
        variants, lambda d: weights_of(d / "v" / "3bpw"),
    ),
    "compensated": Run(("v/3bpw.building/.states",), compensated, lambda d: weights_of(d / "v" / "3bpw")),
    "statistics": Run(
        ("v.stats/statistics.json", "v.stats/layer-00000.safetensors"), two_sided,
        lambda d: weights_of(d / "v" / "3bpw"),
    ),
    "gguf": Run(("v/hf-Q4_0.building.jsonl", "v/hf-Q4_0.gguf.building"), gguf, gguf_file, after=8),
    "heal": Run(("H.healing/journal.jsonl", "H.healing/state.safetensors"), healing, lambda d: weights_of(d / "H")),
    "trace": Run(("t.safetensors.journal",), trace, file_of("t.safetensors"), after=3),
}  # fmt: skip


# ---- damages ---------------------------------------------------------------------------------------------------------


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    return lambda path, _: path.write_bytes(change(path.read_bytes()))


def at(share: float) -> Callable[[Path, Path], object]:
    return rewrite(lambda raw: raw[: int(share * len(raw))])


def flipped(share: float) -> Callable[[Path, Path], object]:
    """One bit, in the middle of a number where there is one near: what no parser sees."""

    def change(raw: bytes) -> bytes:
        place = int(share * len(raw))
        if b"\0" not in raw:  # a text
            place = next((n for n in range(place, len(raw) - 1) if raw[n : n + 2].isdigit()), place)
        return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]

    return rewrite(change)


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path, Path], object]:
    return rewrite(lambda raw: b"".join(change(raw.splitlines(keepends=True))))


def into_a_directory(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "cut at a fifth": at(0.2),
    "cut in the middle": at(0.5),
    "cut before the last byte": rewrite(lambda raw: raw[:-1]),
    "a bit near the start": flipped(0.2),
    "a bit in the middle": flipped(0.55),
    "a bit near the end": flipped(0.95),
    "of another run": lambda path, other: shutil.copyfile(other, path),
    "empty": rewrite(lambda raw: b""),
    "noise": rewrite(lambda raw: bytes(range(256)) * 9 + b"\n" + raw[:40]),
    "gone": lambda path, _: path.unlink(),
    "a directory": into_a_directory,
    "a line twice": lines(lambda found: [*found[:2], *found[1:]]),
    "two lines swapped": lines(lambda found: [found[0], *found[1:3][::-1], *found[3:]]),
}

SLOW = ("auto", "refine", "heal", "statistics")
OF_SLOW = ["cut in the middle", "a bit in the middle", "of another run", "gone"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / name for name in ("text", "prompts", "profile")}
    found["text"].write_text(TEXT)
    traces.write_prompts(found["prompts"])
    traces.model()  # and what else is made once, before any fork
    tiny.variants("qwen3-moe", (3, 4))
    for seed, name in enumerate(("ids", "other ids"), start=1):
        found[name] = folder / f"{name}.safetensors"
        save_file({"input_ids": tiny.rows(4, 16, seed=seed)}, found[name])
    base, made = tiny.base("llama-2"), tiny.variants("llama-2", (3, 4))
    recompile.profile(base, str(made[3]), [str(made[4])], found["profile"], level="tensor", input_ids=found["ids"])
    found |= {"hf": write_hf(folder / "hf", "llama"), "tokens": tokenizer_file(folder / "tokens.gguf")}
    found["other hf"] = write_hf(folder / "other" / "hf", "llama", inner=128)
    found["build"] = make_build("int2", folder / "b").path
    return found


def killed(run: Run, folder: Path, inputs: Inputs, other: bool) -> None:
    """In a fork, so many writes after all files are there."""
    folder.mkdir(parents=True)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"it was not killed: {status}"
        return
    try:
        torch.set_num_threads(1)
        sync, left = os.fsync, run.after

        def counted(descriptor: int) -> None:
            nonlocal left
            sync(descriptor)
            left -= all((folder / name).exists() for name in run.files)
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counted  # type: ignore[assignment]
        run.run(folder, inputs, other)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(9)


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        *((name, OF_SLOW if name in SLOW else list(DAMAGES)) for name in RUNS),
        *(pytest.param(name, list(DAMAGES), marks=pytest.mark.sweep) for name in SLOW),
    ],
)
def test_a_damaged_file_is_named_or_makes_no_difference(
    name: str, damages: Sequence[str], inputs: Inputs, tmp_path: Path
) -> None:
    run, work = RUNS[name], tmp_path / "work"
    killed(run, work, inputs, True)
    work.rename(tmp_path / "other")
    killed(run, work, inputs, False)
    shutil.copytree(work, tmp_path / "killed")
    run.run(work, inputs, False)
    wanted = run.results(work)
    wrong, ends = [], {"same": 0, "refused": 0}
    for file in run.files:
        is_text = b"\0" not in (tmp_path / "killed" / file).read_bytes()
        for label in damages:
            if "line" in label and not (is_text and file.endswith(("jsonl", "journal"))):
                continue
            shutil.rmtree(work)
            shutil.copytree(tmp_path / "killed", work)
            DAMAGES[label](work / file, tmp_path / "other" / file)
            before = (work / file).read_bytes() if (work / file).is_file() else None
            try:
                run.run(work, inputs, False)
            except RecompileError as error:
                said = str(error)
                ends["refused"] += 1
                tells = any(part in said for part in (Path(file).name, Path(file).parent.name) if part)
                if not tells or not any(way in said for way in ("remove", "choose", "move", "make it again", "wanted")):
                    wrong.append(f"{file}, {label}: unclear: {said}")
                if before is not None and (work / file).is_file() and (work / file).read_bytes() != before:
                    wrong.append(f"{file}, {label}: refused ({said}) and changed")
                continue
            except Exception as error:
                wrong.append(f"{file}, {label}: {type(error).__name__}: {error}")
                continue
            ends["same"] += 1
            if run.results(work) != wanted:
                wrong.append(f"{file}, {label}: another result")
    gc.collect()
    assert not wrong, "\n".join(wrong)
    assert ends["refused"] >= 2, ends
