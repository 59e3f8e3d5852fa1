"""Compensated rounding: targets are least squares, tokens are paired, errors made before are made good."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

import recompile
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_quantize import main as model_quantize
from recompile.errors import FormatError
from recompile.model.stream import LayeredModel
from recompile.quantize import compensated
from recompile.quantize.calibrate import InputCollector
from recompile.quantize.compensated import DAMP, ComparedInputs, ComparedPass, Explained, RoundedLayer
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.known_outputs import KnownOutputs
from recompile.quantize.pipeline import BuildOptions, quantize_model
from recompile.quantize.quantize_report import LayerDone
from tests import tiny
from tests.quantize.test_gguf_variants import tokenizer_file
from tests.stream import architectures

# The rest in scripts/test --all: one each is here that is dense, routed, of many parts, with weights as [in, out].
QUICK = ("llama", "glm4-moe", "gemma4", "gpt2", "qwen2-vl")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in architectures.TYPES]


def test_the_target_is_the_least_squares_weight() -> None:
    """Against a solver that knows nothing of sums of products: rows for the damping below those of the tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    turn, add = torch.randn(6, 6, generator=generator).double(), torch.randn(6, 3, generator=generator).double()
    less, lacking = 0.3 * x @ turn, x @ add
    weight, weights = torch.randn(3, 6, generator=generator), torch.rand(400, generator=generator) + 0.5
    group, total = ComparedInputs(["m"]), Explained()
    for part in (slice(0, 250), slice(250, 400)):
        group.add_compared(x[part].float(), less[part].float(), weights[part])
        total.add(lacking[part].float(), (x[part] * weights[part, None]).float(), weights[part])
    group.lacking["m"] = total
    damp = DAMP * float(group.hessian.diagonal().mean())
    rows = torch.cat([weights.double().sqrt()[:, None] * x, damp**0.5 * torch.eye(6, dtype=torch.float64)])
    missing = less @ weight.double().T + lacking  # y - W x': all of it follows from x'
    wanted = torch.cat([weights.double().sqrt()[:, None] * missing, torch.zeros(6, 3, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(group.aimed("m", weight), (weight + change).float(), rtol=0.01, atol=0.01)
    assert float(change.abs().max()) > 0.5


@pytest.mark.parametrize(("tokens", "noise"), [(90, 1.0), (200, 1.0), (200, 5.0), (60, 1.0)])
def test_a_fit_is_shrunk_to_what_holds_on_other_tokens(tokens: int, noise: float) -> None:
    """Over many draws a shrunk fit is as near to the truth as the best share of that fit would be; with few tokens
    for each input there is none."""
    generator = torch.Generator().manual_seed(2)
    truth, inputs = 0.3 * torch.randn(40, 20, generator=generator), 20
    own, plain, best, shares = 0.0, 0.0, [0.0] * 21, []
    for _ in range(40):
        x = torch.randn(tokens, inputs, generator=generator)
        y = x @ truth.T + noise * torch.randn(tokens, 40, generator=generator)
        what = Explained()
        what.add(y, x, None)
        inverse = (x.T @ x + 1e-3 * torch.eye(inputs)).inverse()
        fit = what.product @ inverse
        share = what.share(float((fit * what.product).sum()), inputs, tokens)
        shares.append(share)
        own += float((share * fit - truth).square().sum())
        plain += float((fit - truth).square().sum())
        best = [sum_ + float((n / 20 * fit - truth).square().sum()) for n, sum_ in enumerate(best)]
    if tokens < 4 * inputs:
        assert set(shares) == {0.0}
        return
    assert own < plain
    assert own < 1.05 * min(best)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_compared_with_itself_lacks_nothing(name: str) -> None:
    """Every map that plain calibration sees is compared, on the same tokens, whatever the architecture."""
    base, ids = open_checkpoint(architectures.checkpoint(name)), architectures.rows(3, 13)
    model = LayeredModel.of(base)
    model.model.set_experts_implementation("eager")
    with torch.inference_mode():
        states = list(model.embed(ids, 2))
        compared, unchanged = ComparedPass(base, model, ids, 2), RoundedLayer(base, {})
        for index in range(model.depth):
            found = list(compared.groups(index, states, lambda: unchanged))
            with model.layer(index), InputCollector(model, index) as collector:
                after = [model.run_layer(index, state.clone(), 2 * n) for n, state in enumerate(states)]
            compared.advance(index, states, unchanged)
            for mine, theirs, plain in zip(states, compared.wanted, after, strict=True):
                assert torch.equal(mine, plain)
                assert torch.equal(theirs, plain)
            tokens = {module: group.tokens for group in collector.groups for module in group.modules}
            assert {module: group.tokens for group in found for module in group.modules} == tokens
            for group in found:
                assert group.note == "", group.modules
                assert group.behind is not None, group.modules
                assert all(what.power == 0 for what in (group.behind, *group.lacking.values()))
                name, columns = group.modules[0], len(group.behind.product)
                weight = torch.randn(len(group.lacking[name].product) if name in group.lacking else 5, columns)
                assert torch.equal(group.aimed(name, weight), weight)


@pytest.mark.parametrize("name", EVERY)
def test_outputs_that_are_kept_change_no_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that keeps outputs of final maps, one that has no room to, and one that has room for some."""
    base, ids = open_checkpoint(architectures.checkpoint(name)), architectures.rows(12, 16)
    products, of = {}, KnownOutputs.of
    for room in (0, 30_000, 2**40):
        made = []

        def counted(self: KnownOutputs, modules: Any, x: Tensor, make: Any, made: list[Any] = made) -> Tensor:
            return of(self, modules, x, lambda: made.append(modules) or make())

        monkeypatch.setattr(compensated, "available_bytes", lambda device, room=room: room)
        monkeypatch.setattr(KnownOutputs, "of", counted)
        list(quantize_model(base, tmp_path / f"{room}", IntEncoder((2,), 32), ids, BuildOptions(compensate=True)))
        products[room] = len(made)
    whole, *others = (weights_of(tmp_path / f"{room}" / "2bpw") for room in products)
    assert others == [whole, whole]
    assert products[2**40] <= products[30_000] <= products[0]
    assert products[2**40] < products[0], "outputs were kept"


def to_nearest(weight: Tensor, levels: int) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / levels
    return (weight / step).round() * step


@pytest.mark.parametrize(
    ("name", "most"), [("llama", 0.9), ("opt-projected", 0.9), ("granite", 0.97), ("glm4-moe", 0.9)]
)
def test_errors_of_a_layer_are_made_good_by_the_next(name: str, most: float) -> None:
    """The first layer is rounded hard; the second, free to be anything, brings the states nearer to the base's than its
    own weights do, also on rows that it was not fitted to."""
    base, ids = open_checkpoint(architectures.checkpoint(name)), architectures.rows(96, 16)
    model = LayeredModel.of(base)
    model.model.set_experts_implementation("eager")
    fitted, other = ids[:64], ids[64:]
    with torch.inference_mode():
        rounded: dict[str, Tensor] = {}
        for module in model.modules_of_layer(0):
            if base.modules[module].shape is not None and len(base.modules[module].shape) == 2:
                rounded[f"{module}.weight"] = to_nearest(base.load(f"{module}.weight").float(), 2)
        states = list(model.embed(fitted, 16))
        compared = ComparedPass(base, model, fitted, 16)
        source, own = RoundedLayer(base, rounded), RoundedLayer(base, dict(rounded))
        compared.advance(0, states, source)
        for group in compared.groups(1, states, lambda: source):
            for module in group.modules:
                rounded[f"{module}.weight"] = group.aimed(module, base.load(f"{module}.weight").float())

        def states_after(weights: RoundedLayer | Checkpoint) -> Tensor:
            found = torch.cat(list(model.embed(other, 16)))
            for index in range(2):
                with model.layer(index, weights):
                    found = model.run_layer(index, found)
            return found

        wanted = states_after(base)
        aimed, plain = (float((states_after(one) - wanted).square().mean()) for one in (source, own))
    assert aimed < most * plain


def recorded(model: LayeredModel, index: int, state: Tensor) -> dict[int, dict[int, Tensor]]:
    """expert -> token -> what it was given, of a run of a layer, by the router's answer."""
    found: dict[int, dict[int, Tensor]] = {}

    def record(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, chosen = [*args, *kwargs.values()][:2]
        for token, experts in enumerate(chosen.tolist()):
            for expert in experts:
                found.setdefault(expert, {})[token] = hidden.reshape(-1, hidden.shape[-1])[token].clone()

    with model.layer(index) as layer:
        experts = [module for name, module in layer.named_modules() if name.endswith(".experts")]
        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in experts]
        model.run_layer(index, state)
        for hook in hooks:
            hook.remove()
    return found


def expert_of(module: str) -> int:
    return int(module.split(".experts.")[1].split(".")[0])


@pytest.mark.parametrize("seed", range(3))
def test_experts_are_compared_on_the_tokens_of_both_runs(seed: int) -> None:
    """A layer whose router sends other tokens now: the sums are those of a loop over tokens."""
    base, ids = open_checkpoint(architectures.checkpoint("glm4-moe")), architectures.rows(4, 16)
    model = LayeredModel.of(base)
    model.model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    compared_tokens = others = 0
    with torch.inference_mode():
        states = list(model.embed(ids, 4))
        compared, unchanged = ComparedPass(base, model, ids, 4), RoundedLayer(base, {})
        states[0] += 0.5 * states[0].std() * torch.randn(states[0].shape, generator=generator)
        for index in range(model.depth):
            found = {tuple(group.modules): group for group in compared.groups(index, states, lambda: unchanged)}
            seen = [recorded(model, index, state) for state in (compared.wanted[0], states[0])]
            for modules, group in found.items():
                if not modules[0].endswith(("experts.0.gate_proj", "experts.1.gate_proj", "experts.2.gate_proj")):
                    continue
                theirs, ours = (of_run.get(expert_of(modules[0]), {}) for of_run in seen)
                wanted = torch.zeros_like(group.behind.product)
                for token, x in ours.items():
                    if token in theirs:
                        wanted += torch.outer(theirs[token] - x, x)
                assert torch.allclose(group.behind.product, wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-6)
                assert group.tokens == len(ours)
                compared_tokens += len(ours.keys() & theirs.keys())
                others += len(ours.keys() ^ theirs.keys())
            compared.advance(index, states, unchanged)
    assert min(compared_tokens, others) > 0, "some tokens go where the base sends them, some elsewhere"


@pytest.mark.parametrize(
    "name", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.sweep) for name in architectures.TYPES]
)
def test_every_type_is_built_on_its_own_rounding(name: str, tmp_path: Path) -> None:
    """gpt2 among them, which stores its weights as [in, out]."""
    base, ids = architectures.checkpoint(name), architectures.rows(48, 16)
    for how in ("plain", "sequential", "compensate"):
        options = BuildOptions(**({how: True} if how != "plain" else {}))
        list(quantize_model(open_checkpoint(base), tmp_path / how, IntEncoder((4,), 32), ids, options))
    kls = {how: kl_of(tmp_path / how / "4bpw", base, ids) for how in ("plain", "sequential", "compensate")}
    assert kls["plain"] > 0
    assert max(kls.values()) < 1.5 * kls["plain"]


@pytest.mark.parametrize("how", ["sequential", "compensate"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.sweep)
        for name in architectures.TYPES
    ],
)
def test_a_killed_build_goes_on_to_the_same_bytes(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt2 among them, which stores its weights as [in, out]."""
    base, ids = open_checkpoint(architectures.checkpoint(name)), architectures.rows(12, 16)
    options = BuildOptions(sequential=how == "sequential", compensate=how == "compensate", head=name == "llama")
    check_killed_builds(base, ids, options, tmp_path, monkeypatch)


def check_killed_builds(
    base: Checkpoint, ids: Tensor, options: BuildOptions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after two layers, or the one there is, again and again, it goes on to the same bytes; states are kept once
    a run and at the end, so that most kills leave a layer that is not in them."""
    monkeypatch.setattr("recompile.quantize.kept_states.SECONDS", 1e9)

    def layers(out: str) -> Generator[LayerDone]:
        for event in quantize_model(base, folder / out, IntEncoder((4,), 32), ids, options):
            if isinstance(event, LayerDone):
                yield event

    whole, resumed = list(layers("whole")), []
    for last in (*[min(2, len(whole))] * len(whole), math.inf):  # the last run is left alone
        made, run = 0, layers("killed")
        for event in run:
            resumed.append(event.resumed)
            made += not event.resumed
            if made == last:
                break
        run.close()
    assert any(resumed)
    one, two = (weights_of(folder / out / "4bpw") for out in ("whole", "killed"))
    assert one == two
    assert not list(folder.glob("killed/*.building"))


def weights_of(build: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in build.glob("*.safetensors")}


def test_a_build_is_nearer_to_its_base(tmp_path: Path) -> None:
    """Every weight of a random model counts, so three bits do it much harm."""
    base, ids = tiny.base("llama-2"), tiny.rows(64, 16)

    def run(out: Path, compensate: bool = True) -> Iterator[object]:
        options = BuildOptions(compensate=compensate, head=True)
        return quantize_model(open_checkpoint(base), out, IntEncoder((3,), 32), ids, options)

    list(run(tmp_path / "whole"))
    list(run(tmp_path / "plain", compensate=False))
    assert kl_of(tmp_path / "whole" / "3bpw", base) < 0.95 * kl_of(tmp_path / "plain" / "3bpw", base)
    options = BuildOptions(compensate=True)
    with pytest.raises(FormatError, match="one at a time"):
        list(quantize_model(open_checkpoint(base), tmp_path / "two", IntEncoder((3, 4), 32), ids, options))


@pytest.mark.parametrize(
    "how",
    [
        {"format": "exl2", "bits": ["3"]},
        {"format": "exl3", "bits": ["1"]},
        {"format": "mlx", "bits": ["3"], "group_size": 32},
        {"scheme": ["nvfp4"]},
        {"scheme": ["w4a16-g32"], "method": "mse"},
        {"format": "gguf", "bits": ["Q4_0"]},
    ],
    ids=lambda how: f"{how.get('format', '')}{how.get('scheme', '')}",
)
@pytest.mark.usefixtures("quick_exl3")
def test_every_encoder_takes_what_is_aimed_at(how: dict[str, Any], tmp_path: Path) -> None:
    base, ids = tiny.base("llama-2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(64, 16)}, ids)
    if how.get("format") == "gguf":
        pytest.importorskip("libgguf")
        how = {**how, "tokenizer_from": tokenizer_file(tmp_path / "t.gguf", open_checkpoint(base).config["vocab_size"])}
    kl = []
    for compensate in (False, True):
        out = tmp_path / f"{compensate}"
        recompile.quantize(base, out, input_ids=ids, compensate=compensate, **how)
        (build,) = out.iterdir()
        kl.append(kl_of(build, base))
    assert kl[1] < 0.97 * kl[0]


def kl_of(build: Path, base: Path, rows: Tensor | None = None) -> float:
    """On rows, else on such that nothing was made with."""
    rows = tiny.rows(80, 16)[64:] if rows is None else rows
    p, q = (tiny.streamed_logits(open_checkpoint(path), rows).double().log_softmax(-1) for path in (base, build))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-b", "3", "-b", "4"], "--compensate: found 2 variants, wanted one"),
        (["-b", "4", "--format", "exl3", "--engine", "exllamav3"], "--compensate: not with --engine exllamav3"),
        (["-b", "Q4_K", "--format", "gguf", "--save-imatrix", "x"], "--save-imatrix: inputs of a compensated build"),
        (["--scheme", "w4a16-g32", "--method", "awq"], "do not compensate"),
    ],
)
def test_what_does_not_go_together(words: list[str], message: str, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(4, 16)}, ids)
    arguments = ["-i", str(tiny.base("llama-2")), "-o", str(tmp_path / "out"), "--compensate", *words]
    result = CliRunner().invoke(model_quantize, [*arguments, "--input-ids", str(ids)])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.glob("out/*"))
