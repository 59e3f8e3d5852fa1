"""model_heal: gradients against finite differences, what is written against what was measured, going on, refusing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.diff import DiffReport, compare
from eval.heal import HealChecked, Healing, HealOptions, HealReport, HealStep, Paired, heal
from eval.heal_output import REPORT
from eval.heal_places import whole_of
from eval.heal_rows import HealRows, heal_rows
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_heal import main as model_heal
from recompile.cli.recompile import main as recompile_command
from recompile.errors import NoTimeError, OutputError, RecompileError, UnsupportedError
from recompile.events import Note
from recompile.formats.gptq import GptqScheme
from recompile.formats.mlx_config import MlxScheme
from recompile.io.files import MARKER_NAME, partial_path, unmarked
from recompile.model.rows import RowOptions
from recompile.model.stream import LayeredModel
from recompile.model.used_rows import UsedRows
from recompile.quantize.encoders import Exl2Encoder, IntEncoder
from recompile.quantize.mlx_encoder import MlxEncoder
from recompile.quantize.movable import SCALES, Movable, as_floats, find_movables
from recompile.quantize.pipeline import BuildOptions, Encoder, quantize_model
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from tests import mixes, tiny
from tests.commands import refusal, run
from tests.formats.packers import pack_awq, pack_gptq
from tests.stream import architectures

TOKENS = 24


def encoder_of(kind: str) -> Encoder:
    from recompile.formats.schemes import parse_scheme

    if kind == "exl2":
        return Exl2Encoder((2.5,), 4)
    if kind == "mlx3":
        return MlxEncoder((MlxScheme(3, 32),), {}, method="rtn")
    if kind == "mlx-nvfp4":
        return MlxEncoder((MlxScheme(4, 16, "nvfp4"),), {}, method="rtn")
    if kind.startswith("int"):
        return IntEncoder((int(kind[3]),), 32, "asym" not in kind, "rtn", head_bits=4 if "head" in kind else None)
    return SchemeEncoder((uniform(parse_scheme(kind), "rtn"),))


def make_build(kind: str, folder: Path, architecture: str = "llama-2") -> Checkpoint:
    base, encoder = open_checkpoint(tiny.base(architecture)), encoder_of(kind)
    has_head = kind.startswith("exl") or "head" in kind
    for _ in quantize_model(base, folder, encoder, tiny.rows(2, 16), BuildOptions(head=has_head)):
        pass
    return open_checkpoint(folder / encoder.names[0])


def make_rows(train: int = 24, judges: int = 6) -> HealRows:
    judging = (tiny.rows(judges, TOKENS, seed=10 + n) for n in range(4))
    return HealRows(tiny.rows(train, TOKENS, seed=3), *judging, source="random tokens", second_source="others")


OPTIONS = HealOptions(
    tokens=24 * TOKENS, batch_tokens=4 * TOKENS, check_every=2, learning_rate=0.01, dtype=torch.float32
)


def healing(build: Checkpoint, out: Path, options: HealOptions = OPTIONS, architecture: str = "llama-2") -> Healing:
    return Healing(build, open_checkpoint(tiny.base(architecture)), out, make_rows(), options)


def finish(build: Checkpoint, out: Path, options: HealOptions = OPTIONS, architecture: str = "llama-2") -> HealReport:
    *_, last = heal(build, open_checkpoint(tiny.base(architecture)), out, make_rows(), options)
    assert isinstance(last, HealReport)
    return last


def one_module(kind: str, directory: Path) -> Path:
    """A GPTQ or AWQ file of one module [32, 64] in groups of 32."""
    generator = torch.Generator().manual_seed(9)
    codes, zeros = torch.randint(0, 16, (32, 64), generator=generator), torch.full((32, 2), 8)
    scales = (0.1 + torch.rand(32, 2, generator=generator)).half()
    order = torch.randperm(64, generator=generator) // 32 if kind == "gptq-order" else None
    if kind == "awq":
        parts = pack_awq(codes, zeros, scales)
        settings: dict[str, object] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
        }
    else:
        parts = pack_gptq(codes, zeros, scales, GptqScheme(4, 32, True, "gptq"), order)
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": order is not None}
    tensors = {f"model.layers.0.mlp.up_proj.{part}": value for part, value in parts.items()}
    return mixes.save(directory, tensors, {**mixes.config(), "quantization_config": settings})


def bytes_of(checkpoint: Checkpoint, tensor: str) -> Tensor:
    return checkpoint.read(tensor).contiguous().flatten().view(torch.uint8)


# ---- gradients ------------------------------------------------------------------------------------------------------


def slope_along(direction: dict[str, Tensor], work: Healing, ids: Tensor, wanted: Tensor, step: float) -> float:
    """Of the loss on rows `ids`, by two steps of every movable's delta along `direction`."""
    losses = []
    for size in (step, -step):
        for name, towards in direction.items():
            work.movables[name].delta = size * towards
        losses.append(work.step(ids, wanted))
    for name, towards in direction.items():
        work.movables[name].delta = torch.zeros_like(towards)
    return (losses[0] - losses[1]) / (2 * step)


# Every kind of format whose scales move.
KINDS = [
    "int3",
    "int3-asym",
    "int4-head",
    "w8a16",
    "fp8-channel",
    "fp8-block",
    "nvfp4",
    "gptq",
    "gptq-order",
    "awq",
    "exl2",
    "exl3",
    "mlx3",
    "mlx-nvfp4",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_s_gradient_is_what_doubling_it_does(kind: str, tmp_path: Path) -> None:
    """<G, W> is linear in every scale, and doubling is exact: <G, W(2 s)> - <G, W(s)> = s d<G, W>/ds."""
    made_up = {"exl3": lambda: mixes.as_exl3(tmp_path / "v", 2)}  # its encoder is slow
    made_up |= {name: lambda: one_module(kind, tmp_path / "v") for name in ("gptq", "gptq-order", "awq")}
    build = open_checkpoint(made_up[kind]()) if kind in made_up else make_build(kind, tmp_path / "v")
    movables = find_movables(build)
    modules = {tensor.rpartition(".")[0] for tensor, movable in movables.items() if movable.reduce is not None}
    generator = torch.Generator().manual_seed(0)
    for module in sorted(modules)[:: max(1, len(modules) // 4)]:
        stored = build.modules[module]
        weight = build.load(stored.dense_name).float()
        gradient = torch.randn(weight.shape, generator=generator)
        parts = {part: build.read(info.name) for part, info in stored.parts.items()}
        for part, info in stored.parts.items():
            moving = movables.get(info.name)
            if moving is None or moving.reduce is None:
                continue
            found = moving.gradient(weight, gradient).flatten()
            if moving.added:  # of a step of `unit`
                found = found / moving.unit * moving.start.flatten()
            for place in torch.randperm(found.numel(), generator=generator)[:6].tolist():
                doubled = parts[part].clone()
                flat = as_floats(doubled).view(-1)
                flat[place] = (flat[place].float() * 2).to(flat.dtype)
                after = build.decode(stored, {**parts, part: doubled}).float()
                change = float(((after - weight).double() * gradient).sum())
                assert float(found[place]) == pytest.approx(change, rel=5e-3, abs=5e-3), (module, part, place)


@pytest.mark.parametrize("keeps_graph", [False, True])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("int3", "llama-2"),
        ("int3-asym", "llama-bias"),
        ("int4-head", "llama-2"),
        ("int3", "qwen2-moe"),
        ("int3", "gemma2"),
    ],
)
def test_gradients_are_those_of_finite_differences(
    kind: str, architecture: str, keeps_graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a random direction of each kind of tensor; numbers move in float32, so that differences are smooth."""
    work = healing(make_build(kind, tmp_path / "v", architecture), tmp_path / "out", architecture=architecture)
    work.keeps_graph = keeps_graph
    if "moe" in architecture:  # a step that sends a token to another expert makes the loss jump
        check_slopes(work, monkeypatch, (1e-4,), 1e-2, stays=r"\.experts\.")
    else:
        check_slopes(work, monkeypatch, (2e-3,), 1e-4, stays=None)


def check_slopes(
    work: Healing, monkeypatch: pytest.MonkeyPatch, steps: tuple[float, ...], slack: float, stays: str | None
) -> None:
    """Within 2 % of the gradient's size and `slack`, at one of the steps at least; stays: a pattern of what may have no
    gradient, None: nothing may."""
    for name, movable in work.movables.items():
        work.movables[name] = replace(movable, dtype=torch.float32)
    found: dict[str, Tensor] = {}
    monkeypatch.setattr(work.adam, "step", lambda movables, gradients, rate: found.update(gradients))
    ids = work.rows.train[: work.batch_rows]
    wanted = work.teacher_states(ids)
    work.step(ids, wanted)
    gradients = dict(found)
    unmoved = set(work.movables) - set(gradients)
    assert all(stays is not None and re.search(stays, name) for name in unmoved), unmoved
    generator = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(m.start.shape, generator=generator) for name, m in work.movables.items()}
    kinds: dict[str, set[str]] = {}
    for name in gradients:
        place = (
            "head"
            if name.startswith("lm_head")
            else "experts"
            if ".experts." in name
            else "norm"
            if "norm" in name
            else ""
        )
        kinds.setdefault(f"{place} {name.rpartition('.')[2]}", set()).add(name)

    for label, names in kinds.items():
        predicted = sum(float((gradients[name] * direction[name]).sum()) for name in names)
        size = sum(float(gradients[name].square().sum()) for name in names) ** 0.5
        towards = {name: direction[name] for name in names}
        slopes = [slope_along(towards, work, ids, wanted, step) for step in steps]
        wrong = min(abs(slope - predicted) for slope in slopes)
        assert wrong <= 0.02 * size + slack, (label, slopes, predicted)


STAYS = r"\.experts\.|\.indexer\.|\.gate\.bias$"  # experts without tokens, and what only chooses
OF_TYPES = [
    name
    if name in ("gpt2", "gpt-oss", "llama4-text", "gemma4", "camembert")
    else pytest.param(name, marks=pytest.mark.sweep)
    for name in architectures.TYPES
]


def healing_of_type(architecture: str, folder: Path, options: HealOptions = OPTIONS) -> Healing:
    base, ids = open_checkpoint(architectures.checkpoint(architecture)), architectures.rows(12, TOKENS)
    if not (folder / "v").exists():
        list(quantize_model(base, folder / "v", IntEncoder((3,), 32), ids[:2], BuildOptions()))
    rows = HealRows(*(ids[:4] for _ in range(5)))
    return Healing(open_checkpoint(folder / "v" / "3bpw"), base, folder / "out", rows, options)


@pytest.mark.parametrize("architecture", OF_TYPES)
def test_gradients_of_every_type(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in one tensor, [in, out] or gate and up in turn; weights stored as [in, out]."""
    work = healing_of_type(architecture, tmp_path)
    check_slopes(work, monkeypatch, (1e-3, 2e-4, 5e-5), 1e-3, stays=STAYS)


@pytest.mark.parametrize("architecture", OF_TYPES)
def test_steps_in_bfloat16_go_the_same_way(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of all numbers together."""
    found: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("eval.heal.sketch_dtype", lambda device, dtype=dtype: dtype)
        work = healing_of_type(architecture, tmp_path, replace(OPTIONS, dtype=None))
        assert (work.model.dtype, work.trained.dtype) == (torch.float32, dtype)
        gradients: dict[str, Tensor] = {}
        monkeypatch.setattr(work.adam, "step", lambda _, new, rate, into=gradients: into.update(new))
        ids = work.rows.train
        work.step(ids, work.teacher_states(ids, work.trainer))
        parts = [gradients.get(name, torch.zeros_like(movable.start)) for name, movable in work.movables.items()]
        found[dtype] = torch.cat([part.flatten() for part in parts])
    alike = torch.cosine_similarity(found[torch.float32], found[torch.bfloat16], dim=0)
    assert float(alike) > (0.2 if architecture == "dory" else 0.9), "dory's loss bends at changes of a thousandth"


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int3", "int3-asym", "nvfp4", "exl2", "mlx3", "mlx-nvfp4", "mix"])
def test_what_is_written_is_what_was_measured(kind: str, tmp_path: Path) -> None:
    architecture = "llama" if "nvfp4" in kind else "llama-2"  # which two layers leave little to gain
    if kind == "mix":
        made = tiny.variants("llama-2", (2, 4))
        recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.mlp.*": made[4]})
        run(recompile_command, "-i", made[2], "-o", tmp_path / "mix", "-or", recipe, "--quiet")
        build = open_checkpoint(tmp_path / "mix")
    else:
        build = make_build(kind, tmp_path / "v", architecture)
    out, base = tmp_path / "out", open_checkpoint(tiny.base(architecture))
    rows = make_rows()
    options = replace(OPTIONS, learning_rate=0.003) if kind in ("nvfp4", "mlx3", "mlx-nvfp4") else OPTIONS
    *_, report = heal(build, base, out, rows, options)
    assert isinstance(report, HealReport)
    assert report.kept
    assert report.accept.is_better
    assert report.report.after < report.report.before
    healed = open_checkpoint(out)
    moved = {name for name in build.tensors if not torch.equal(bytes_of(healed, name), bytes_of(build, name))}
    assert moved
    assert moved <= set(find_movables(build)), "codes stay"
    assert {name: (i.dtype, i.shape) for name, i in healed.tensors.items()} == {
        name: (i.dtype, i.shape) for name, i in build.tensors.items()
    }
    *_, measured = compare(healed, base, rows.report)
    assert isinstance(measured, DiffReport)
    assert measured.kl.mean == pytest.approx(report.report.after, rel=1e-5)
    assert measured.kl_rows == pytest.approx(report.kl_rows["report"], rel=1e-4)
    run(recompile_command, "--check", out)
    assert json.loads((out / REPORT).read_text())["best_step"] == report.best_step
    assert not list(tmp_path.glob("*.healing"))
    if kind in ("int3", "mix"):
        model = tiny.plain_model(out)
        assert torch.allclose(
            tiny.plain_logits(model, rows.report[:1]),
            tiny.plain_logits(
                tiny.plain_model(tiny.dense_copy(healed, tmp_path / "dense", tiny.base(architecture))), rows.report[:1]
            ),
            atol=1e-4,
        )


def test_steps_may_run_in_another_dtype_than_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, base, rows = make_build("int3", tmp_path / "v"), open_checkpoint(tiny.base("llama-2")), make_rows()
    monkeypatch.setattr("eval.heal.sketch_dtype", lambda device: torch.bfloat16)
    report = finish(build, tmp_path / "out", replace(OPTIONS, dtype=None))
    assert (report.dtype, report.train_dtype) == ("torch.float32", "torch.bfloat16")
    assert report.accept.is_better
    *_, measured = compare(open_checkpoint(tmp_path / "out"), base, rows.report)
    assert isinstance(measured, DiffReport)
    assert measured.kl_rows == pytest.approx(report.kl_rows["report"], rel=1e-4)


@pytest.mark.parametrize(
    ("calibrated", "is_left_out"), [(0, False), (4, True), pytest.param(None, False, marks=pytest.mark.sweep)]
)
def test_rows_that_a_build_was_calibrated_on_do_not_train_it(
    calibrated: int | None, is_left_out: bool, tmp_path: Path
) -> None:
    """Nor do other rows of their documents, unless they are most of the text."""
    text = tmp_path / "text.txt"
    numbers = torch.randint(0, 1000, (200, 20), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text("\n\n\n".join(" ".join(map(str, some)) for some in numbers))
    build, where = make_build("int3", tmp_path / "v"), RowOptions(2, 32, text=text)
    whole = where.read_up_to([build.path], "calibrate", 10_000, 4)
    seen = whole.part(0, len(whole.ids) if calibrated is None else calibrated)
    path = tmp_path / "v" / "3bpw" / "quantize_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": asdict(UsedRows.of(seen, "calibrate"))}))
    rows, _ = heal_rows(open_checkpoint(tiny.base("llama-2")), build, where, 6 * 32)
    parts = [frozenset(document.split("+")) for document in whole.documents]
    known = frozenset().union(*parts[: len(seen.ids)])
    fresh = [row for row, part in enumerate(parts) if part.isdisjoint(known)]
    wanted = fresh if is_left_out else range(len(parts))
    assert torch.equal(rows.train, whole.ids[list(wanted)[:6]])
    assert torch.equal(rows.train, whole.ids[:6]) != is_left_out


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_run_ends_with_the_same_files_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice undisturbed, by clocks of different speed; a third goes on from what a kill after a look leaves: the folder
    as it is at that moment."""
    build = make_build("int2", tmp_path / "v")

    def started(name: str) -> Iterator[object]:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return heal(build, open_checkpoint(tiny.base("llama-2")), Path("H"), make_rows(), OPTIONS)

    def finished(name: str) -> dict[str, bytes]:
        """As far as the report, where callers stop to listen."""
        clock = count(step=1.0 + len(name))
        with monkeypatch.context() as patched:
            patched.setattr("eval.heal.time", SimpleNamespace(monotonic=lambda: next(clock)))
            report = next(event for event in started(name) if isinstance(event, HealReport))
        assert report.kept
        assert report.seconds > 0
        return files_of(tmp_path / name)

    whole = finished("one")
    assert {path.partition("/")[0] for path in whole} == {"H"}, "nothing of the work is left"
    assert finished("another") == whole
    looks = 0
    for event in started("stopped"):
        looks += isinstance(event, HealChecked)
        if looks == 2 and isinstance(event, HealStep):
            shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
            break
    assert {path.partition("/")[0] for path in files_of(tmp_path / "killed")} == {"H.healing"}
    assert finished("killed") == whole


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A build, and the work folder of a run on it that was stopped after its second look."""
    folder = tmp_path_factory.mktemp("stopped")
    build = make_build("int2", folder / "v")
    looks = 0
    for event in heal(build, open_checkpoint(tiny.base("llama-2")), folder / "H", make_rows(), OPTIONS):
        looks += isinstance(event, HealChecked)
        if looks == 2:
            break
    return build, folder / "H.healing"


def test_killed_between_the_name_of_the_output_and_the_end_of_its_work(
    stopped: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    build, work = stopped
    again = partial(heal, build, open_checkpoint(tiny.base("llama-2")), tmp_path / "H", make_rows())
    *_, report = again(OPTIONS)
    whole = files_of(tmp_path)
    shutil.copytree(work, tmp_path / "H.healing")
    (tmp_path / "H" / MARKER_NAME).touch()
    note, found = again(OPTIONS)
    assert isinstance(note, Note)
    assert "H: the run before this had written it when it was stopped" in note.text
    assert isinstance(report, HealReport)
    assert found == replace(report, seconds=0.0)
    assert files_of(tmp_path) == whole
    assert not (tmp_path / "H.healing").exists()
    with unmarked(tmp_path / "H.healing"):  # a kill there leaves both
        note = partial_path(tmp_path / "H.healing").read_bytes()
    (tmp_path / "H.healing").mkdir()
    partial_path(tmp_path / "H.healing").write_bytes(note)
    with pytest.raises(OutputError, match="H: exists already"):  # not even its journal is left
        next(again(OPTIONS))
    assert not list(tmp_path.glob("H.healing*"))
    (tmp_path / "H.healing").mkdir()
    with pytest.raises(OutputError, match="H: exists already"):  # the user's
        next(again(OPTIONS))
    (tmp_path / "H.healing").rmdir()
    shutil.copytree(work, tmp_path / "H.healing")
    with pytest.raises(OutputError, match="H: exists already"):  # a run with other arguments is another one
        next(again(replace(OPTIONS, learning_rate=0.5)))
    assert (tmp_path / "H.healing").exists()


def test_a_work_folder_of_the_user_is_left_alone(stopped: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    mine = tmp_path / "H.healing" / "state.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OutputError, match=r"H\.healing: exists and is not an unfinished output"):
        list(heal(stopped[0], open_checkpoint(tiny.base("llama-2")), tmp_path / "H", make_rows(), OPTIONS))
    assert os.listdir(mine.parent) == ["state.txt"]
    mine.unlink()  # an empty one is no more ours
    with pytest.raises(OutputError, match=r"H\.healing: exists and is not an unfinished output"):
        list(heal(stopped[0], open_checkpoint(tiny.base("llama-2")), tmp_path / "H", make_rows(), OPTIONS))
    assert list(tmp_path.iterdir()) == [mine.parent]


def damaged(**changed: object) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        state = work / "state.safetensors"
        with safe_open(state, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            kept = {key: value for key, value in stored.metadata().items() if key != "crc32"}
            about = json.loads(kept["recompile_heal"])
        name = min(tensors)
        for key, value in changed.items():
            if key == "tensor" and value is None:
                del tensors[name]
            elif key == "tensor":
                tensors[name] = value(tensors[name])  # type: ignore[operator]
            elif value is None:
                del about[key]
            else:
                about[key] = value
        save_file(tensors, state, {**kept, "recompile_heal": json.dumps(about)})

    return write


def rewritten(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda work: (work / name).write_bytes(content)


def a_pipe(work: Path) -> None:
    (work / "state.safetensors").unlink()
    os.mkfifo(work / "state.safetensors")


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (rewritten("journal.jsonl", b"[1]\n{}\n"), "H.healing: was begun with other settings"),
    (rewritten("journal.jsonl", b'{"kind"\n{}\n'), r"journal.jsonl:1:8: not JSON"),
    (rewritten("journal.jsonl", b"\0\xff\n"), r"journal.jsonl:1: not UTF-8 text"),
    (
        rewritten("state.safetensors", b""),
        "state.safetensors: not a whole safetensors file.*; remove",
    ),
    (a_pipe, "state.safetensors: cannot be read: it is a named pipe"),
    (damaged(tensor=None), "state.safetensors: .*; remove .*H.healing to start again"),
    (damaged(tensor=lambda t: t[..., :1].contiguous()), "state.safetensors: .* has another shape or dtype"),
    (damaged(tensor=lambda t: t.double()), "state.safetensors: .* has another shape or dtype"),
    (damaged(tensor=lambda t: t * math.nan), "state.safetensors: .* numbers that are not finite"),
    (damaged(step=None), "state.safetensors: recompile_heal: the field step is missing"),
    (damaged(step=-1), "state.safetensors: recompile_heal: step: -1, wanted a count"),
    (damaged(best_kl=math.nan), "state.safetensors: recompile_heal: best_kl: nan, wanted a finite number"),
    (damaged(seconds="x"), 'state.safetensors: recompile_heal: seconds: the text "x", wanted a number'),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_damaged_state_is_refused_by_name(
    stopped: tuple[Checkpoint, Path], tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    build, work = stopped
    shutil.copytree(work, tmp_path / "H.healing")
    damage(tmp_path / "H.healing")
    with pytest.raises(RecompileError, match=said):
        next(heal(build, open_checkpoint(tiny.base("llama-2")), tmp_path / "H", make_rows(), OPTIONS))
    assert not (tmp_path / "H").exists()


def test_any_number_of_tokens_takes_no_memory_for_those_to_come(tmp_path: Path) -> None:
    """2^40 tokens would be 2^30 row numbers; batches of as many tokens are all rows there are."""
    build = make_build("int2", tmp_path / "v")
    many = replace(OPTIONS, tokens=2**40, batch_tokens=2**40)
    events = heal(build, open_checkpoint(tiny.base("llama-2")), tmp_path / "H", make_rows(), many)
    first = next(event for event in events if isinstance(event, HealStep))
    assert first.steps == -(-(2**40) // make_rows().train.numel())


@pytest.mark.parametrize("what", ["base", "build"])
def test_a_run_does_not_go_on_with_another_model(tmp_path: Path, what: str) -> None:
    """One number of the config, or one bit in the middle of a tensor, is another model."""
    build, base = (
        make_build("int2", tmp_path / "v"),
        open_checkpoint(tiny.copy_of(tiny.base("llama-2"), tmp_path / "b")),
    )
    for event in heal(build, base, tmp_path / "out", make_rows(), OPTIONS):
        if isinstance(event, HealChecked):
            break
    if what == "base":
        config = json.loads((base.path / "config.json").read_text())
        (base.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    else:
        shard = next(iter(build.path.glob("*.safetensors")))
        raw = bytearray(shard.read_bytes())
        raw[-len(raw) // 3] ^= 1
        shard.write_bytes(raw)
    changed = open_checkpoint(build.path), open_checkpoint(base.path)
    with pytest.raises(OutputError, match=rf"other settings \({what}\)"):
        next(iter(heal(*changed, tmp_path / "out", make_rows(), OPTIONS)))


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    build = make_build("int2", tmp_path / "v")
    whole = finish(build, tmp_path / "whole")
    events = heal(build, open_checkpoint(tiny.base("llama-2")), tmp_path / "out", make_rows(), OPTIONS)
    looks = 0
    for event in events:
        looks += isinstance(event, HealChecked)
        if looks == 2 and isinstance(event, HealStep):  # a step after the second look: its work is done again
            break
    events.close()
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="other settings"):
        finish(build, tmp_path / "out", replace(OPTIONS, seed=1))
    again = finish(build, tmp_path / "out")
    assert again.best_step == whole.best_step
    assert again.report == whole.report
    for name in build.tensors:
        assert torch.equal(open_checkpoint(tmp_path / "out").read(name), open_checkpoint(tmp_path / "whole").read(name))
    with pytest.raises(OutputError, match="exists already"):
        finish(build, tmp_path / "out")


def test_minutes_are_those_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves a second whenever it is asked: two seconds before judging is known to take 5, then steps. They
    end where what is left is for the verdict, the rate with them."""
    build, clock, limits, rates = make_build("int4", tmp_path / "v"), count(), [], []
    monkeypatch.setattr("eval.heal.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    step = Healing.step
    monkeypatch.setattr(Healing, "step", lambda self, *given: (rates.append(self._rate_now()), step(self, *given))[1])
    options = replace(OPTIONS, tokens=1000 * OPTIONS.batch_tokens, minutes=20 / 60)
    for event in heal(build, open_checkpoint(tiny.base("llama-2")), tmp_path / "out", make_rows(), options):
        if isinstance(event, HealStep):
            limits.append(event.limit)
    assert limits == [pytest.approx(13.0)] * 9, "with a second for every look, and the next step would be late"
    assert rates[-1] == min(rates) or rates[-1] < 0.2 * max(rates)
    with pytest.raises(
        NoTimeError, match=r"minutes 0.1 are too few: judging alone takes about 0.12 minutes .* \(now 6 a role\)"
    ):
        list(
            heal(
                build,
                open_checkpoint(tiny.base("llama-2")),
                tmp_path / "no",
                make_rows(),
                replace(options, minutes=0.1),
            )
        )
    assert not (tmp_path / "no").exists()
    assert not list(tmp_path.glob("no*")), "nothing is left of it"


def test_what_is_not_better_is_not_written(tmp_path: Path) -> None:
    build = make_build("int4", tmp_path / "v")
    report = finish(build, tmp_path / "out", replace(OPTIONS, learning_rate=3.0, patience=2))
    assert not report.kept
    assert report.best_step == 0
    assert report.steps == 4, "it stopped when two looks found nothing"
    assert report.report.before == pytest.approx(report.report.after)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_the_verdict_asks_for_more_than_luck() -> None:
    clear = Paired.of([1.0, 2.0, 3.0, 4.0], [0.9, 1.9, 2.9, 3.9])
    luck = Paired.of([1.0, 2.0, 3.0, 4.0], [0.2, 2.1, 3.1, 4.1])
    assert clear.is_better
    assert clear.gain == pytest.approx(-0.1)
    assert luck.gain < 0
    assert not luck.is_better


def test_numbers_stay_within_what_their_type_holds() -> None:
    start = torch.tensor([6e4, 6e-8, 1.0, -2.0])
    movable = Movable("s", start, torch.float16, lambda product: product)
    assert torch.equal(movable.stored, start.half())
    movable.delta = torch.tensor([1.0, -3.0, 1.0, 1.0])
    assert movable.stored.float().tolist() == pytest.approx([6e4, 6e-8, 2.718, -5.437], rel=1e-2)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_healed_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    with pytest.raises(UnsupportedError, match="nothing in it is quantized"):
        finish(base, tmp_path / "out")
    build = make_build("int3", tmp_path / "v")
    monkeypatch.delitem(SCALES, "pack-quantized")  # as GGUF's types are missing
    with pytest.raises(UnsupportedError, match="is stored as pack-quantized, whose scales model_heal does not move"):
        finish(build, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(RecompileError, match="too little: healing needs"):
        finish(build, tmp_path / "out", replace(OPTIONS, max_memory_bytes=1 << 20))
    rows = replace(make_rows(), accept=tiny.rows(1, TOKENS))
    with pytest.raises(RecompileError, match="accept rows"):
        next(heal(build, base, tmp_path / "out", rows, OPTIONS))
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_the_command(tmp_path: Path) -> None:
    build = make_build("int2", tmp_path / "v")
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n\n".join(f"Document {n}. " + " ".join(f"word{(n * k) % 97}" for k in range(60)) for n in range(80))
    )
    common = ("-i", build.path, "-mb", tiny.base("llama-2"), "--text", text, "-r", 4, "-l", 32, "--batch-tokens", 128)
    json_path = tmp_path / "report.json"
    said = run(
        model_heal,
        *common,
        "-o",
        tmp_path / "out",
        "--tokens",
        3000,
        "--learning-rate",
        0.01,
        "--json",
        json_path,
        "--quiet",
    )
    assert "another kind of text" in said
    report = json.loads(json_path.read_text())
    assert report["kept"]
    assert report["accept"]["after"] < report["accept"]["before"]
    said = refusal(model_heal, *common, "-o", tmp_path / "worse", "--tokens", 600, "--learning-rate", 5, "--quiet")
    assert "nothing was written" in said
    assert not (tmp_path / "worse").exists()
    shutil.rmtree(tmp_path / "out")


def test_a_parameter_that_is_some_rows_of_a_stored_weight() -> None:
    """HRM keeps gate, queries, keys and values in one tensor, and transformers takes it apart."""
    base = open_checkpoint(architectures.checkpoint("hrm-text"))
    model = LayeredModel.of(base, dtype=torch.float32)
    stored = base.load("model.L_module.layers.0.attn.gqkv_proj.weight")
    total = torch.zeros(stored.shape)
    for leaf in ("gate_proj", "q_proj", "k_proj", "v_proj"):
        name = f"model.L_module.layers.0.self_attn.{leaf}.weight"
        whole = whole_of(model, name, tuple(stored.shape))
        assert whole is not None
        total += whole.filled(model.load_parameter(name))
    assert torch.equal(total, stored)
    other = "model.L_module.layers.0.self_attn.o_proj.weight"
    assert whole_of(model, other, model.shapes[other]) is None
