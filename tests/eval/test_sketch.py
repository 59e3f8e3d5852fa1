"""The sketch against the dense quadratic form, against exact swaps, and what it promises of memory and rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.passes.adjoint import AdjointPass, LayerBackward, SwapProducts, plan_pass
from eval.passes.fisher import FisherCotangents, draw_labels
from eval.profile.exact import ProfileJob, ProfileOptions, make_groups
from eval.profile.hybrid import FIRST_ROUND
from eval.profile.sketch import (
    Sketch,
    SketchOptions,
    SketchStarted,
    SweepDone,
    estimate,
    interactions_of,
    profile_sketch,
    samples_beside,
    squared_gradient_scores,
)
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, load_profile
from recompile.errors import JournalError, RecompileError
from recompile.model.stream import LayeredModel
from tests import tiny

BITS = (2, 4)


def checkpoints(architecture: str) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base = open_checkpoint(tiny.base(architecture))
    return base, {str(b): open_checkpoint(d) for b, d in tiny.variants(architecture, BITS).items()}


def products(
    architecture: str, ids: Tensor, samples: int, *, seed: int = 0, level: str = "tensor", **plan: bool | int
) -> dict[tuple[str, str], SwapProducts]:
    base, candidates = checkpoints(architecture)
    model = LayeredModel.of(base)
    groups = make_groups(candidates, ProfileOptions(level=level))
    made = plan_pass(model, groups, len(candidates), len(ids), ids.shape[1], samples)
    if plan:
        made = type(made)(**{**vars(made), **plan})
    cotangents = FisherCotangents(model, candidates, groups, samples, seed)
    found: dict[tuple[str, str], SwapProducts] = {}
    for event in AdjointPass(model, base, candidates, groups, made).run(ids, cotangents):
        if isinstance(event, LayerBackward):
            found.update({(swap.group, swap.source): swap for swap in event.swaps})
    return found


def dense_changes(architecture: str, ids: Tensor) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """The reference's logits, and d logits of every swap to first order, by central differences in float64."""
    base, candidates = checkpoints(architecture)
    model = tiny.plain_model(base.path).double()
    reference = tiny.plain_logits(model, ids)
    found = {}
    step = 1e-4
    for label, candidate in candidates.items():
        for name, module in candidate.modules.items():
            if module.is_quantized:
                weight = model.get_parameter(f"{name}.weight")
                kept = weight.data
                change = candidate.load(f"{name}.weight").double() - kept
                sides = []
                for sign in (1, -1):
                    weight.data = kept + sign * step * change
                    sides.append(tiny.plain_logits(model, ids))
                weight.data = kept
                found[(name, label)] = (sides[0] - sides[1]) / (2 * step)
    return reference, found


def quadratic(logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """sum over tokens of dz' F dz / (2 tokens) of every row."""
    p = logits.softmax(-1)
    inner = (p * first * second).sum(-1) - (p * first).sum(-1) * (p * second).sum(-1)
    return inner.mean(-1) / 2


@pytest.mark.parametrize(
    "architecture", ["llama-2", pytest.param("gemma2", marks=pytest.mark.sweep)]
)  # gemma2: a soft cap after the head
def test_samples_are_unbiased_for_the_quadratic_form_and_for_pairs(architecture: str) -> None:
    ids, samples = tiny.rows(2, 12), 600
    logits, changes = dense_changes(architecture, ids)
    found = products(architecture, ids, samples)
    assert set(found) == set(changes)
    off = []
    for swap, change in changes.items():
        values = found[swap].products.double().square() / (2 * ids.shape[1])  # [rows, samples]
        wanted = quadratic(logits, change, change)
        error = values.std(1) / samples**0.5
        off.append(((values.mean(1) - wanted) / error).numpy())
    first, second = ("model.layers.0.mlp.up_proj", "2"), ("model.layers.1.self_attn.o_proj", "2")
    for one, other in ((first, second), (first, ("model.layers.0.mlp.down_proj", "2"))):
        values = found[one].products.double() * found[other].products.double() / (2 * ids.shape[1])
        wanted = quadratic(logits, changes[one], changes[other])
        off.append(((values.mean(1) - wanted) / (values.std(1) / samples**0.5)).numpy())
    z = np.concatenate(off)  # standard normal if unbiased; those of one row share their samples
    assert abs(z).max() < 4.5
    assert abs(z.mean()) < 1


def test_strata_average_to_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0]])
    grid = (torch.arange(64) + 0.5) / 64
    labels = draw_labels(p, grid[:, None, None].expand(64, 2, 4))  # every stratum evenly
    shares = torch.nn.functional.one_hot(labels, 4).double().mean((0, 2))
    torch.testing.assert_close(shares, p.double(), atol=0.01, rtol=0)
    assert labels[:, 0, 0].max() == 0  # the first quarter lies in the first token's half


@pytest.mark.parametrize("architecture", ["llama-2", "qwen3-moe"])
def test_batches_scratch_files_and_decoding_again_change_nothing(architecture: str) -> None:
    ids = tiny.rows(4, 16)
    plain = products(architecture, ids, 6)
    other = products(architecture, ids, 6, batch_rows=1, scratch=True, keep_deltas=False)
    for swap, found in plain.items():
        torch.testing.assert_close(found.products, other[swap].products, rtol=2e-3, atol=1e-4)
        assert torch.equal(found.tokens, other[swap].tokens)


def test_products_of_moe_groups_follow_the_dense_gradient() -> None:
    """<G, dW> of every expert matrix, with G from a plain backward through transformers' own model."""
    ids = tiny.rows(1, 24)
    base, candidates = checkpoints("qwen3-moe")
    model = LayeredModel.of(base)
    level = "tensor"
    groups = make_groups(candidates, ProfileOptions(level=level))
    found = products("qwen3-moe", ids, 1)
    plain = tiny.plain_model(base.path)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    normed = plain.model(ids, use_cache=False).last_hidden_state
    with torch.no_grad():
        model.load(model.head, model.prefix_of(model.head))
        cotangent, _ = FisherCotangents(model, candidates, groups, 1).at_norm(slice(0, 1), normed.detach())
    normed.backward(cotangent[0])
    for label, candidate in candidates.items():
        model.source = candidate
        for name in model.origins:
            if ".layers." not in name or "norm" in name:
                continue
            gradient = plain.get_parameter(name).grad
            change = model.load_parameter(name, candidate) - plain.get_parameter(name).detach()
            modules = {m for m in model.modules_of_layer(int(name.split(".")[2])) if name in model.parameters_of(m)}
            grouped = [m for m in modules if (m, label) in found]
            if grouped and gradient is not None:
                wanted = float((gradient * change).sum())
                got = sum(float(found[(m, label)].products) for m in grouped)
                assert got == pytest.approx(wanted, rel=2e-3, abs=2e-4), name


def run(path: Path, architecture: str = "llama-2", rows: int = 6, level: str = "tensor", **settings: object) -> Profile:
    base, candidates = checkpoints(architecture)
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    ids = tiny.rows(rows, 24)
    options = SketchOptions(**settings)  # type: ignore[arg-type]
    *_, profile = profile_sketch(ProfileJob(base, 4, given, ids, path, ProfileOptions(level=level)), options)
    assert isinstance(profile, Profile)
    return profile


def test_a_profile_ranks_as_exact_swaps_do(tmp_path: Path) -> None:
    from eval.profile.exact import profile_exact

    base, candidates = checkpoints("llama-2")
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    options = ProfileOptions(level="tensor")
    *_, exact = profile_exact(ProfileJob(base, 4, given, tiny.rows(6, 24), tmp_path / "exact.jsonl", options))
    assert isinstance(exact, Profile)
    sketch = run(tmp_path / "sketch.jsonl", samples=64)
    plain = run(tmp_path / "plain.jsonl", samples=64, shrink=False)
    diagonal = run(tmp_path / "diagonal.jsonl", samples=64, mode="diagonal")
    assert load_profile(tmp_path / "sketch.jsonl").measurements == sketch.measurements
    for profile, bound in ((sketch, 0.35), (plain, 0.35), (diagonal, 1.0)):
        assert profile.is_complete
        logs = [np.log(profile.measurements[swap].mean / found.mean) for swap, found in exact.measurements.items()]
        assert abs(np.median(logs)) < bound
        assert profile.header.method == ("diagonal" if profile is diagonal else "sketch")
    scatter = [
        np.std([np.log(p.measurements[swap].mean / found.mean) for swap, found in exact.measurements.items()])
        for p in (sketch, plain)
    ]
    assert scatter[0] < scatter[1]  # shrinking takes noise away
    cost = sketch.cost("model.layers.0.mlp.up_proj", "2")
    assert cost is not None
    assert 0 < cost.std_error < cost.kl_nats


def test_an_interrupted_run_goes_on_to_the_same_profile(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", samples=24)
    base, candidates = checkpoints("llama-2")
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    job = ProfileJob(base, 4, given, tiny.rows(6, 24), tmp_path / "cut.jsonl", ProfileOptions(level="tensor"))
    events = profile_sketch(job, SketchOptions(24))
    for event in events:
        if isinstance(event, SweepDone):
            break
    events.close()
    again = profile_sketch(job, SketchOptions(24))
    started = next(again)
    assert isinstance(started, SketchStarted)
    assert (started.sweeps, started.resumed) == (3, 1)
    *_, profile = again
    assert isinstance(profile, Profile)
    assert profile.measurements == whole.measurements
    lines = job.path.read_text()
    *_, third = profile_sketch(job, SketchOptions(24))
    assert third == profile
    assert job.path.read_text() == lines, "a run that finds all done adds nothing"


def test_experts_without_tokens_are_unmeasured_as_in_the_exact_profile(tmp_path: Path) -> None:
    from eval.profile.exact import profile_exact

    base, candidates = checkpoints("qwen3-moe")
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    options = ProfileOptions(level="expert")
    job = ProfileJob(base, 4, given, tiny.rows(1, 3), tmp_path / "exact.jsonl", options)
    *_, exact = profile_exact(job)
    *_, sketch = profile_sketch(replace(job, path=tmp_path / "sketch.jsonl"), SketchOptions(4))
    assert isinstance(exact, Profile)
    assert isinstance(sketch, Profile)
    assert sketch.unreached() == exact.unreached()
    assert 0 < len(sketch.unreached()) < sum(".experts." in group.name for group in sketch.header.groups)
    cost = sketch.cost(sketch.unreached()[0], "2")
    assert cost is None or cost.is_prior


def test_the_samples_beside_a_profile_give_its_squared_gradients_too(tmp_path: Path) -> None:
    sketch = run(tmp_path / "sketch.jsonl", samples=16)
    diagonal = run(tmp_path / "diagonal.jsonl", samples=16, mode="diagonal")
    kept = samples_beside(tmp_path / "sketch.jsonl", sketch.header)
    assert kept is not None
    assert interactions_of(kept, sketch.header.row_tokens) is None  # made without --pairs
    found = squared_gradient_scores(kept, sketch.header.row_tokens)
    assert found == pytest.approx({swap: cost.mean for swap, cost in diagonal.measurements.items()})
    assert samples_beside(tmp_path / "other.jsonl", sketch.header) is None
    other = replace(sketch.header, rows_sha256="of other rows")
    with pytest.raises(JournalError, match="the sweeps of another measurement"):
        samples_beside(tmp_path / "sketch.jsonl", other)


def test_sweeps_of_other_rows_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "p.jsonl", samples=8, rows=3)
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(JournalError, match="sweeps of another measurement"):
        run(tmp_path / "p.jsonl", samples=8, rows=4)


def test_pairs_are_kept_and_sum_to_a_group(tmp_path: Path) -> None:
    """A group of two modules costs what its singles and their interaction cost."""
    from eval.profile.sketch import SweepStore

    single = run(tmp_path / "single.jsonl", samples=8, shrink=False, keep_pairs=True)
    fused = run(tmp_path / "fused.jsonl", samples=8, shrink=False, level="fused")
    kept = SweepStore(tmp_path / "single.jsonl", single.header).load(1)
    assert kept.pairs is not None
    at = {swap: number for number, swap in enumerate(kept.swaps)}
    gate, up = (kept.pairs[at[(f"model.layers.0.mlp.{leaf}", "2")]] for leaf in ("gate_proj", "up_proj"))
    together = fused.measurements[("model.layers.0.mlp.gate_proj+up_proj", "2")]
    rows = ((gate + up) ** 2).mean(1) / (2 * 24)
    np.testing.assert_allclose(together.kl_rows, rows, rtol=1e-3)


def test_shrinking_needs_samples_and_keeps_what_it_cannot_judge() -> None:
    swaps = tuple((f"model.layers.{n}.mlp.up_proj", "2") for n in range(10))
    values = np.ones((10, 3))
    sketch = Sketch(swaps, values * 4, values * 16, values * 0, np.ones((10, 3), dtype=np.int64), 2)
    np.testing.assert_array_equal(estimate(sketch, 5), estimate(sketch, 5, shrink=False))  # no scores to learn from


def made_sketch(rows: int, samples: int, seed: int) -> tuple[Sketch, np.ndarray]:
    """A sketch of swaps whose true costs are known, [swaps]: the score times a ratio of type, candidate and group, in
    rows of very different size; samples of a normal of that variance."""
    rng = np.random.default_rng(seed)
    kinds = [(layer, leaf, label) for layer in range(30) for leaf in ("up", "down", "o") for label in ("2", "3", "4")]
    swaps = tuple((f"model.layers.{layer}.{leaf}_proj", label) for layer, leaf, label in kinds)
    own = {layer_leaf: rng.lognormal(0, 0.15) for layer_leaf in {kind[:2] for kind in kinds}}
    ratio = np.array([{"up": 0.8, "down": 1.3, "o": 1.1}[leaf] * own[layer, leaf] for layer, leaf, _ in kinds])
    score = rng.lognormal(0, 1, len(kinds))
    sizes = rng.lognormal(0, 1, rows)
    sizes /= sizes.mean()
    scores = score[:, None] * sizes * rng.lognormal(0, 0.1, (len(kinds), rows))
    draws = rng.normal(size=(len(kinds), rows, samples)) ** 2 * (scores * ratio[:, None])[..., None]
    tokens = np.ones((len(kinds), rows), dtype=np.int64)
    # T = 1/2, so that sums of squares are costs
    return Sketch(swaps, draws.sum(2), (draws**2).sum(2), scores * samples, tokens, samples), score * ratio


@pytest.mark.parametrize(("rows", "samples"), [(4, 2), (10, 2), (20, 3), (6, 32)])
def test_a_shrunk_estimate_is_nearer_the_truth_than_its_two_sources(rows: int, samples: int) -> None:
    errors: dict[str, list[float]] = {"shrunk": [], "plain": [], "score": []}
    for seed in range(5):
        sketch, truth = made_sketch(rows, samples, seed)
        for name, settings in (("shrunk", {}), ("plain", {"shrink": False}), ("score", {"diagonal": True})):
            found = estimate(sketch, 0.5, **settings).mean(1)  # type: ignore[arg-type]
            errors[name].append(float(np.log(found / truth / np.median(found / truth)).std()))
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    assert means["shrunk"] < means["score"], means
    assert means["shrunk"] < means["plain"], means
    if samples * rows >= 40:
        assert means["shrunk"] < 0.75 * means["score"], means  # it has learnt the types


def test_weighed_rows_keep_the_total_and_let_no_document_decide_alone() -> None:
    sketch, _ = made_sketch(8, 4, 0)
    plain, weighed = (estimate(sketch, 0.5, weigh=weigh) for weigh in (False, True))  # type: ignore[arg-type]
    assert weighed.sum() == pytest.approx(plain.sum(), rel=0.1)
    shares = [values.sum(0) / values.sum() for values in (plain, weighed)]
    assert shares[1].max() < 0.8 * shares[0].max()


def test_a_cap_that_cannot_be_kept_is_refused() -> None:
    base, candidates = checkpoints("llama-2")
    model = LayeredModel.of(base)
    groups = make_groups(candidates, ProfileOptions(level="tensor"))
    with pytest.raises(RecompileError, match="max_memory 1 MiB is too little"):
        plan_pass(model, groups, 2, 4, 16, 8, cap_bytes=2**20)
    free = plan_pass(model, groups, 2, 4, 16, 8)
    assert not free.scratch
    assert free.keep_deltas


# ---- hybrid ----------------------------------------------------------------------------------------------------------


def test_expected_gain_is_that_of_drawing() -> None:
    from eval.profile.hybrid import expected_gain

    draws = np.random.default_rng(0).normal(0.3, 0.5, 400_000)
    assert expected_gain(0.3, 0.5) == pytest.approx(np.maximum(-draws, 0).mean(), rel=0.02)
    assert expected_gain(0.3, 0.0) == 0.0


def test_hybrid_runs_the_swaps_that_decide_and_keeps_their_exact_cost(tmp_path: Path) -> None:
    from eval.profile.exact import profile_exact
    from eval.profile.hybrid import HybridOptions, HybridRound, profile_hybrid
    from recompile.optimize.choose import Budget

    base, candidates = checkpoints("llama-2")
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    options = ProfileOptions(level="tensor")
    job = ProfileJob(base, 4, given, tiny.rows(4, 24), tmp_path / "exact.jsonl", options)
    *_, exact = profile_exact(job)
    assert isinstance(exact, Profile)
    hybrid = HybridOptions(Budget(bpw=3.5), minutes=0.05, least_gain_nats=0.0)
    events = list(profile_hybrid(replace(job, path=tmp_path / "hybrid.jsonl"), SketchOptions(8), hybrid))
    profile = events[-1]
    assert isinstance(profile, Profile)
    rounds = [event for event in events if isinstance(event, HybridRound)]
    kept = load_profile(tmp_path / "hybrid.jsonl.exact.jsonl").measurements
    assert len(kept) == rounds[-1].swaps >= 8
    for swap, found in kept.items():
        assert found.kl_rows == pytest.approx(exact.measurements[swap].kl_rows, rel=1e-3, abs=1e-6)
        assert profile.measurements[swap] == found
    assert load_profile(tmp_path / "hybrid.jsonl").measurements == profile.measurements
    assert profile.is_complete


def test_a_hybrid_that_was_stopped_takes_the_same_rounds_again(tmp_path: Path) -> None:
    """Stopped in any round, and run again when it was finished, it leaves the bytes of a run that was not."""
    from eval.profile.exact import Measured
    from eval.profile.hybrid import HybridOptions, profile_hybrid
    from recompile.optimize.choose import Budget

    base, candidates = checkpoints("llama-2")
    given = [(int(label), candidate) for label, candidate in candidates.items()]
    hybrid = HybridOptions(Budget(bpw=3.5), minutes=60, least_gain_nats=1e-4)

    def run(name: str, stop_after: int | None = None) -> bytes:
        job = ProfileJob(base, 4, given, tiny.rows(2, 8), tmp_path / name, ProfileOptions(level="tensor"))
        events = profile_hybrid(job, SketchOptions(4), hybrid)
        swaps = 0
        for event in events:
            swaps += isinstance(event, Measured)
            if swaps == stop_after:
                events.close()  # type: ignore[attr-defined]
                break
        return job.path.read_bytes()

    whole = run("whole.jsonl")
    swaps = len(load_profile(tmp_path / "whole.jsonl.exact.jsonl").measurements)
    assert swaps > FIRST_ROUND
    for stop in (1, 5, FIRST_ROUND, FIRST_ROUND + 3, swaps):
        run(f"{stop}.jsonl", stop)
        assert run(f"{stop}.jsonl") == whole, stop
    assert run("whole.jsonl") == whole
