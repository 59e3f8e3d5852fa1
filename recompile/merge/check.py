"""Do headers, index and configs of any checkpoint agree, as the engine of its format reads them?

Its bytes against its manifest: verify.py; variants against each other: check_same_weights.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

from recompile.arguments import Worded
from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.checkpoint.config_fields import architectures_of
from recompile.checkpoint.module_names import NUMBERS, role_of
from recompile.checkpoint.tied_head import find_tied_head, stored_head
from recompile.errors import CheckpointError
from recompile.formats import FORMATS
from recompile.formats.compressed_tensors import QUANT_METHOD
from recompile.io.files import MARKER_NAME
from recompile.merge import engine_rules as engines
from recompile.merge.check_formats import (
    gguf_problems,
    readers_of,
)
from recompile.merge.configs import COMPRESSED_FORMATS, family_of
from recompile.merge.left_dense import is_plain, known_roles
from recompile.merge.loader_truth import misread
from recompile.merge.problems import Problem
from recompile.merge.target_rules import ROWS
from recompile.merge.write_plan import MANIFEST_NAME, WritePlan


def check_checkpoint(directory: str | os.PathLike[str]) -> list[Problem]:
    """Every inconsistency of a finished checkpoint, as the engine of its format would meet it. Reads headers, configs
    and the small parts of quantized modules; imports torch for quantized ones.

    Raises nothing for a damaged checkpoint: a directory that cannot even be opened is one problem.
    """
    label = os.fspath(directory)
    try:
        checkpoint = open_checkpoint(directory)
        modules = checkpoint.modules
    except CheckpointError as error:
        return [Problem(label, str(error).removeprefix(f"{label}: "))]
    problems = [Problem(label, note.removeprefix(f"{label}: "), "warning") for note in checkpoint.notes]
    if isinstance(checkpoint, GgufCheckpoint):
        return problems + gguf_problems(checkpoint)
    if (checkpoint.path / MARKER_NAME).exists() and not (checkpoint.path / MANIFEST_NAME).exists():
        problems.append(Problem(label, "is an unfinished output of recompile"))
    formats = {module.format for module in modules.values() if module.is_quantized}
    for reader in [_general_problems, *readers_of(checkpoint, formats)]:
        try:
            problems += reader(checkpoint)
        except CheckpointError as error:  # what stops one reader is a problem like the others
            problems.append(Problem(label, str(error).removeprefix(f"{label}: ")))
    return problems


def _general_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    families: dict[str, str] = {}
    for module in checkpoint.modules.values():
        if module.is_quantized:
            families.setdefault(family_of(checkpoint, module), module.name)
    method = checkpoint.quantization_config.get("quant_method")
    if len(families) > 1:
        listed = " and ".join(f"{family} ({name})" for family, name in families.items())
        yield Problem(checkpoint.label, f"holds {listed}; no engine loads these formats in one model")
    elif families and method is None:
        family = next(iter(families))
        row = FORMATS.get(family)
        severity = "error" if row is None or row.config_is_read else "warning"
        yield Problem(
            "config.json", f"has no quantization_config, and {families[family]} is stored as {family}", severity
        )
    elif (
        families
        and not families.keys() & {method}
        and any(name in FORMATS and FORMATS[name].names_method for name in {method, *families})
    ):
        family = next(iter(families))
        yield Problem("config.json", f"quant_method is {method!r}, and {families[family]} is stored as {family}")
    elif not families and method is not None:
        yield Problem("config.json", f"has a quantization_config ({method}), and no module is stored quantized")
    for module in checkpoint.modules.values():
        for part, dtypes in FORMATS[module.format].scales.items():
            info = module.parts.get(part)
            if info is not None and info.dtype not in dtypes:
                wanted = " or ".join(sorted(dtypes))
                yield Problem(info.name, f"is {info.dtype}, wanted {wanted}, as {module.format} has it")
    yield from _head_problems(checkpoint)


def _head_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    causal = any(name.endswith("ForCausalLM") for name in architectures_of(checkpoint.config))
    tied_head = find_tied_head(checkpoint)
    if tied_head is not None:
        yield Problem("config.json", str(tied_head), "warning" if tied_head.is_copy else "error")
    untied = checkpoint.config.get("tie_word_embeddings") is False
    if untied and causal and stored_head(checkpoint.modules) is None and not _has_head_by_shape(checkpoint):
        yield Problem("config.json", "tie_word_embeddings is false, and no output head is stored")


def _has_head_by_shape(checkpoint: Checkpoint) -> bool:
    """Whether a map outside the layers gives a value for every token, under a name of its own
    (`cls.predictions.decoder`)."""
    vocab = checkpoint.config.get("vocab_size")
    shapes = [
        module.shape
        for name, module in checkpoint.modules.items()
        if role_of(name) != "embedding" and not NUMBERS.search(name) and not name.endswith("word_embeddings")
    ]
    return any(shape is not None and len(shape) == 2 and shape[0] == vocab for shape in shapes)


# ---- engines ----


def check_engine(directory: str | os.PathLike[str], engine: str) -> list[Problem]:
    """What keeps vLLM, transformers or SGLang (see engines.py) from running a finished checkpoint. Raises nothing for
    a damaged one: `check_checkpoint` names that."""
    try:
        return engine_problems(open_checkpoint(directory), engine)
    except CheckpointError:
        return []


def engine_problems(checkpoint: Checkpoint, engine: str) -> list[Problem]:
    """What keeps an engine from running it, as far as headers and the model's classes tell. Raises CheckpointError."""
    found = [_as_problem(finding) for finding in engines.findings(engine, checkpoint)]
    if engine in ROWS:
        loaded = {} if is_plain(checkpoint.config) else _loaded_names(checkpoint)
        applied = misread(engine, checkpoint.modules, checkpoint.quantization_config, loaded)
        found += [Problem(where, message) for where, message in applied]
    return found + _left_out(checkpoint) if engine == "transformers" else found


def _loaded_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored name -> the name in transformers' model; experts keep theirs, which it puts together."""
    roles = known_roles(checkpoint)
    return {name: role.loader for name, role in roles.items() if role.part == "text" and ".experts." not in name}


def _left_out(checkpoint: Checkpoint) -> list[Problem]:
    """Modules that transformers passes over while loading, one line for each reason."""
    if checkpoint.quantization_config.get("quant_method") != QUANT_METHOD:
        return []
    from recompile.model.loads import left_out_by_transformers

    reasons: dict[str, list[str]] = {}
    for name, why in left_out_by_transformers(checkpoint):
        reasons.setdefault(why, []).append(name)
    more = {why: f" ({len(names)} modules like it)" if len(names) > 1 else "" for why, names in reasons.items()}
    return [Problem(names[0], why + more[why]) for why, names in reasons.items()]


def loaders_that_fail(directory: str | os.PathLike[str]) -> list[Problem]:
    """A warning for every engine of the checkpoint's format that would not run it, with the first reason."""
    try:
        checkpoint = open_checkpoint(directory)
        if isinstance(checkpoint, GgufCheckpoint) or not set(checkpoint.formats) & COMPRESSED_FORMATS:
            return []
    except CheckpointError:
        return []
    warnings = []
    for engine in engines.ENGINES:
        errors = [found for found in check_engine(directory, engine) if found.severity == "error"]
        if errors:
            more = f"; {{engine}} {engine} lists {len(errors)} reasons" if len(errors) > 1 else ""
            told = Worded(f"{engine} does not run this: {errors[0].where}: {errors[0].message}{more}")
            warnings.append(Problem(os.fspath(directory), told, "warning"))
    return warnings


def check_plan(plan: WritePlan, engine: str) -> list[Problem]:
    """The same for a merge that is planned."""
    placed = {module.name: (module.placement.checkpoint, module.placement.stored) for module in plan.modules}
    converted = {
        module.name: engines.kind_of_group(module.conversion.format, module.conversion.group)
        for module in plan.modules
        if module.conversion is not None and module.conversion.group is not None
    }
    config = json.loads(plan.texts["config.json"])
    found = [_as_problem(finding) for finding in engines.findings_of(engine, placed, config, converted)]
    if engine in ROWS and not converted:
        modules = {name: stored for name, (_, stored) in placed.items()}
        quantization = config.get("quantization_config")
        quantization = quantization if isinstance(quantization, Mapping) else {}
        found += [Problem(where, message) for where, message in misread(engine, modules, quantization)]
    return found


def _as_problem(finding: engines.Finding) -> Problem:
    return Problem(finding.where, finding.message, finding.severity)
