"""Costs from the weights alone: how far the outputs of each matrix move, without running a model to its end.

For speed, and to compare with: the score of llama.cpp's proposal for --target-bpw (its pull request 15550). For a row w
of a weight and its error e = w' - w, with inputs of mean square s_j and mean m_j in column j,

    error = sum_j s_j e_j^2 + (m . e)^2

The second term says that an error along the mean input shifts the output always in the same direction. It is divided
by the same expression of the weight itself, averaged over sampled rows without the largest and smallest 1 %, and
multiplied by the number of rows. Queries and keys take a weighted cosine distance instead, since attention sees
directions. Some matrices count more than others by fixed factors. The figures are no nats: they rank candidates.

Without importance s = 1 and m = 0: the plain squared error, and no text is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from eval.profile.exact import Measured, ProfileJob
from recompile.checkpoint.checkpoint import WeightSource
from recompile.checkpoint.module_names import role_of
from recompile.costs import Measurement, Profile, ProfileGroup, open_journal
from recompile.errors import ArgumentError
from recompile.model.stream import LayeredModel, default_dtype
from recompile.quantize.activation_stats import InputMoments, collect_moments

SAMPLED_WEIGHTS = 1 << 20  # of each matrix
TRIMMED = 0.01  # of the rows' errors at either end
TINY = 1e-12  # under the norm of a row of zeros
COSINE = frozenset({"q_proj", "k_proj", "attn_q", "attn_k"})
# By the last part of a name, as the proposal has them; names of Hugging Face or of GGUF.
FACTORS = {"down_proj": 6.0, "w2": 6.0, "ffn_down": 6.0, "v_proj": 1.25, "attn_v": 1.25}
HEAD_FACTOR, TIED_FACTOR = 3.0, 2.5


def profile_weights(job: ProfileJob, *, importance: bool = True) -> Iterator[Measured | Profile]:
    """Score every (group, candidate); yields a Measured per swap and last the Profile.

    The inputs that the job's rows give weigh the errors; each row gives a score of its own, so that the costs have
    standard errors. Without importance the rows are not run and all scores of a swap are equal.
    A journal that is there goes on where it was, and serves any number of budgets. Raises as `profile_exact` does.
    """
    if job.options.context != "clean":
        raise ArgumentError("{mode} weights compares with the reference's weights; use {context} clean")
    model = job.model() if importance else None  # without inputs no model is built: any GGUF file will do
    reference, device = job.reference, job.options.device
    dtype = model.dtype if model is not None else job.options.dtype or default_dtype(device)
    settings = {"importance": importance, "sampled_weights": SAMPLED_WEIGHTS}
    header = job.header(dtype, method="weights", settings=settings)
    with open_journal(job.path, header) as journal:
        todo: dict[str, list[str]] = {}
        for name, label in journal.profile.missing():
            todo.setdefault(name, []).append(label)
        total = sum(len(group.bits) for group in header.groups)
        done = total - sum(map(len, todo.values()))
        rows = header.rows
        if journal.profile.control is None:
            journal.append([Measurement(None, None, (0.0,) * rows)])
        groups = [group for group in header.groups if group.name in todo]
        for group, moments in _with_moments(model, job.ids, groups, job.counted):
            for label in todo[group.name]:
                scores = torch.zeros(rows, dtype=torch.float64)
                candidate = job.by_label[label]
                for module in group.modules:
                    scores += score_module(reference, candidate, module, moments.get(module), rows, device)
                found = Measurement(group.name, label, tuple(scores.tolist()))
                journal.append([found])
                done += 1
                yield Measured(found, done, total)
        yield journal.profile


def _with_moments(
    model: LayeredModel | None, ids: Tensor, groups: Sequence[ProfileGroup], counted: Tensor | None = None
) -> Iterator[tuple[ProfileGroup, Mapping[str, InputMoments]]]:
    """Every group, when the inputs of its modules are known; those of one layer are held at a time. model: None for
    scores without inputs."""
    if model is None:
        yield from ((group, {}) for group in groups)
        return
    waiting = {module: group for group in groups for module in group.modules}
    head = any(role_of(module) == "head" for module in waiting)
    seen: set[str] = set()
    for layer in collect_moments(model, ids, head=head, counted=counted):
        moments = {module: inputs for inputs in layer for module in inputs.modules}
        for group in {waiting[module].name: waiting[module] for module in moments if module in waiting}.values():
            seen.add(group.name)
            yield group, moments
    for group in groups:  # the embedding, and experts that no token reached
        if group.name not in seen:
            yield group, {}


def score_module(
    reference: WeightSource,
    candidate: WeightSource,
    module: str,
    moments: InputMoments | None,
    rows: int,
    device: str = "cpu",
) -> Tensor:
    """Scores of one module of the candidate, float64 [rows]: one for the inputs of each row of text."""
    name = f"{module}.weight"
    weight = reference.load(name, device=device)
    height = weight.shape[0]
    step = max(1, weight.numel() // SAMPLED_WEIGHTS)
    weight = weight[::step].float()
    error = candidate.load(name, device=device)[::step].float() - weight
    columns = weight.shape[1]
    squares, means = torch.ones(1, columns, device=device), torch.zeros(1, columns, device=device)
    if moments is not None:
        whole = moments.tokens.clamp(min=1)[:, None].to(moments.sums.device)
        squares, means = moments.sum_squares / whole, moments.sums / whole
        unseen = moments.tokens.to(squares.device) == 0  # an expert that this row sent nothing to
        if bool(unseen.any()) and not bool(unseen.all()):
            squares = torch.where(unseen[:, None], squares[~unseen].mean(0), squares)
            means = torch.where(unseen[:, None], means[~unseen].mean(0), means)
    leaf = module.rpartition(".")[2]
    each = cosine_distance(weight, error, squares) if leaf in COSINE else relative_error(weight, error, squares, means)
    scores = trimmed_mean(each) * height * _factor(reference, module, leaf)
    return scores.double().cpu().expand(rows)


def relative_error(weight: Tensor, error: Tensor, squares: Tensor, means: Tensor) -> Tensor:
    """(sum s e^2 + (m . e)^2) / the same of w. weight, error: [sampled, in]; squares, means: [texts, in]; returns
    [texts, sampled]."""
    moved = squares @ error.square().T + (means @ error.T).square()
    whole = squares @ weight.square().T + (means @ weight.T).square()
    return moved / whole.clamp(min=TINY)


def cosine_distance(weight: Tensor, error: Tensor, squares: Tensor) -> Tensor:
    """1 - cos(w, w') under the weights s, in [0, 2]; shapes as in relative_error."""
    made = weight + error
    inner = squares @ (weight * made).T
    length = (squares @ weight.square().T) * (squares @ made.square().T)
    # Rounding may leave a cosine above 1 by a few units.
    return (1 - inner / length.sqrt().clamp(min=TINY)).clamp(min=0)


def trimmed_mean(values: Tensor) -> Tensor:
    """Mean over the last axis, [..., n] -> [...], without the largest and the smallest 1 % (rounded down)."""
    cut = int(TRIMMED * values.shape[-1])
    ordered = values.sort(-1).values
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def _factor(reference: WeightSource, module: str, leaf: str) -> float:
    if role_of(module) == "head":
        return HEAD_FACTOR
    if role_of(module) == "embedding":
        return TIED_FACTOR if reference.config.get("tie_word_embeddings") else 1.0
    return FACTORS.get(leaf, 1.0)
