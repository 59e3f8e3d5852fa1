"""Does a checkpoint hold the model of its config.json, in numbers? What headers and configs alone do not tell.

format_problems     weights of one format under another's quant_method
vocabulary_problems embedding against vocab_size and tokenizer
model_problems      the list of modules and their shapes against the model that transformers builds of config.json
value_problems      scales and norms that are NaN or infinite
loaders             what each engine would do with it, in a sentence
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.errors import CheckpointError, RecompileError, UnsupportedError
from recompile.formats import FLOAT_DTYPES, FORMATS
from recompile.formats.compressed_tensors import QUANT_METHOD
from recompile.io.files import read_json
from recompile.merge import engine_rules as engines
from recompile.merge.check import engine_problems
from recompile.merge.problems import Problem

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 2 << 30  # of scales and norms that a check reads; of a larger checkpoint the first ones
_SCALE_DTYPES = FLOAT_DTYPES | {"F8_E4M3", "F8_E5M2"}


def format_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A module that no reader of the config's quant_method reads."""
    method = checkpoint.quantization_config.get("quant_method")
    if method is None or isinstance(checkpoint, GgufCheckpoint):
        return
    told = set()
    for module in checkpoint.modules.values():
        readers = FORMATS[module.format].readers
        if module.is_quantized and readers and method not in readers and module.format not in told:
            told.add(module.format)
            yield Problem(
                "config.json",
                f"quant_method is {method!r}, and {module.name} is stored as {module.format}, which goes with "
                f"{' or '.join(readers)}; engines would read its parts as something else",
            )


def vocabulary_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """An embedding of other rows than vocab_size says, or of fewer than the tokenizer has tokens."""
    text = checkpoint.config.get("text_config")
    wanted = (text if isinstance(text, Mapping) else {}).get("vocab_size", checkpoint.config.get("vocab_size"))
    for name, module in checkpoint.modules.items():
        role = role_of(name)
        if role not in ("embedding", "head") or module.shape is None or len(module.shape) != 2:
            continue
        rows, padded = module.shape[0], FORMATS[module.format].pads_to is not None
        differs = isinstance(wanted, int) and (rows < wanted or (rows > wanted and not padded))
        if differs and rows != _rows_of_model(checkpoint, role):
            yield Problem(name, f"has {rows} rows, and vocab_size in config.json is {wanted}; loaders refuse it")
        largest = _largest_token(checkpoint) if role == "embedding" else None
        if largest is not None and largest >= rows:
            yield Problem(
                "tokenizer.json",
                f"has a token {largest}, and {name} has rows 0 to {rows - 1}; it is another model's tokenizer, or the "
                f"embedding was not made larger when tokens were added",
            )


def _rows_of_model(checkpoint: Checkpoint, role: str) -> int | None:
    """Rows that the model of config.json has: Llama 3.2 Vision embeds 8 tokens beyond vocab_size. None: not known."""
    from recompile.model.roles import loader_model

    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        model = loader_model(json.dumps(config, sort_keys=True, default=str))
    except (CheckpointError, UnsupportedError):
        return None
    table = model.get_input_embeddings() if role == "embedding" else model.get_output_embeddings()
    return None if table is None else int(table.weight.shape[0])


def _largest_token(checkpoint: Checkpoint) -> int | None:
    path = checkpoint.path / "tokenizer.json"
    if isinstance(checkpoint, GgufCheckpoint) or not path.exists():
        return None
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1] if vocab else []
    added = content.get("added_tokens") if isinstance(content, dict) else None
    ids += [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return max((found for found in ids if isinstance(found, int)), default=None)


def model_problems(checkpoint: Checkpoint) -> tuple[list[Problem], str]:
    """Modules that the model of config.json has and the checkpoint lacks, or the reverse, or that have other shapes;
    and what was compared, in a sentence. Imports transformers; reads headers alone."""
    from recompile.model.stream import LayeredModel

    try:
        model = LayeredModel.of(checkpoint)
    except UnsupportedError as error:
        return [], f"modules and shapes were not compared with config.json: {_plain(error, checkpoint)}"
    except RecompileError as error:
        return [Problem(checkpoint.label, _plain(error, checkpoint))], "modules were compared with config.json"
    problems = []
    for name, shape in model.shapes.items():
        origin = model.origins.get(name)
        if origin is None or origin.converter is not None:
            continue
        tensor = origin.tensors[0]
        info, module = checkpoint.tensors.get(tensor), checkpoint.modules.get(tensor.rpartition(".")[0])
        packed = module is not None and module.is_quantized and tensor == module.dense_name  # `weight` may hold codes
        if module is not None and (packed or info is None):
            found = module.shape
        else:
            found = info.shape if info is not None else None
        padded = module is not None and FORMATS[module.format].pads_to is not None
        if module is not None and module.is_quantized and model.is_turned(module.name):
            shape = shape[::-1]  # a Conv1D's weight is [in, out], quantized ones are [out, in] everywhere
        if found is None or tuple(found) == shape or (padded and _covers(found, shape)):
            continue
        problems.append(Problem(tensor, f"is {list(found)}, the model of config.json wants {list(shape)}"))
    return problems, "modules and shapes were compared with config.json"


def _covers(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(have >= want for have, want in zip(found, wanted, strict=True))


def _plain(error: Exception, checkpoint: Checkpoint) -> str:
    return str(error).removeprefix(f"{checkpoint.label}: ")


def value_problems(checkpoint: Checkpoint) -> tuple[list[Problem], str]:
    """Scales and norms that hold NaN or infinities; and what was read, in a sentence. Codes and dense matrices are not
    read here: --verify and any run do."""
    chosen = [info for module in checkpoint.modules.values() for info in _small_floats(checkpoint, module.name)]
    problems: list[Problem] = []
    read = 0
    for count, info in enumerate(chosen):
        if read + info.size_bytes > READ_BYTES:
            return problems, f"values were read of {count} of {len(chosen)} scales and norms, the first 2 GiB"
        read += info.size_bytes
        bad = _not_finite(read_tensor(info))
        if bad:
            problems.append(Problem(info.name, f"holds {bad} NaN or infinite values of {info.numel}; make it again"))
    if not chosen:
        return problems, "no values were read"
    return problems, f"values were read of {len(chosen)} scales and norms, not of codes and dense matrices"


def _small_floats(checkpoint: Checkpoint, name: str) -> list[TensorInfo]:
    """Of a quantized module its float parts but the bias's weight, of others the vectors."""
    module = checkpoint.modules[name]
    if isinstance(checkpoint, GgufCheckpoint) or module.format == "gguf":
        return [info for info in module.parts.values() if info.dtype in FLOAT_DTYPES and len(info.shape) == 1]
    kinds = _SCALE_DTYPES if module.is_quantized else FLOAT_DTYPES
    most = 3 if module.is_quantized else 1
    return [
        info
        for part, info in module.parts.items()
        if info.dtype in kinds and len(info.shape) <= most and not (module.is_quantized and part == "weight")
    ]


def _not_finite(value: Tensor) -> int:
    value = value.float() if value.element_size() == 1 else value
    return int((~value.isfinite()).sum())


def loaders(checkpoint: Checkpoint) -> list[str]:
    """What transformers, vLLM and SGLang do with it as far as headers tell, a sentence each."""
    lines = []
    own = {FORMATS[name].engine for name in checkpoint.formats}
    with_loaders = [name for name, (_, engine) in engines.LOADERS.items() if engine in own]
    for engine in (*engines.ENGINES, *with_loaders):
        try:
            found = [problem for problem in engine_problems(checkpoint, engine) if problem.severity == "error"]
        except CheckpointError as error:
            lines.append(f"{engine}: not known: {_plain(error, checkpoint)}")
            continue
        more = f" (and {len(found) - 1} more reasons)" if len(found) > 1 else ""
        lines.append(
            f"{engine}: does not load it: {found[0].where}: {found[0].message}{more}"
            if found
            else f"{engine}: nothing in it keeps it from loading{_rounding(checkpoint, engine)}"
        )
    return lines


def _rounding(checkpoint: Checkpoint, engine: str) -> str:
    """What an engine does to weights that it loads, as the end of a sentence."""
    if engine != "transformers" or checkpoint.quantization_config.get("quant_method") != QUANT_METHOD:
        return ""
    from recompile.model.loads import fused_by_transformers

    fused = fused_by_transformers(checkpoint)
    if not fused:
        return ""
    kinds = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    dtypes = {info.dtype for name in fused for part, info in checkpoint.modules[name].parts.items() if "scale" in part}
    rounded = " or ".join(sorted(kinds.get(dtype, dtype) for dtype in dtypes))
    return (
        f"; it decodes the {len(fused)} weights of experts to {rounded}, the dtype of their scales, and computes with "
        f"them in it, whatever dtype is asked for"
    )


def check_model(checkpoint: Checkpoint) -> tuple[list[Problem], list[str]]:
    """All of the above: problems, and what was and was not looked at."""
    problems = [*_told(checkpoint, format_problems), *_told(checkpoint, vocabulary_problems)]
    notes = []
    for look in (model_problems, value_problems):
        try:
            found, note = look(checkpoint)
        except CheckpointError as error:
            found, note = [Problem(checkpoint.label, _plain(error, checkpoint))], ""
        problems += found
        notes += [note] if note else []
    return problems, [*notes, *loaders(checkpoint)]


def _told(checkpoint: Checkpoint, look: Callable[[Checkpoint], Iterator[Problem]]) -> list[Problem]:
    try:
        return list(look(checkpoint))
    except CheckpointError as error:  # what stops one look is a problem like the others
        return [Problem(checkpoint.label, _plain(error, checkpoint))]
