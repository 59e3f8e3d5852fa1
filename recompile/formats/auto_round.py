"""AutoRound checkpoints (`quant_method: auto-round`): GPTQ or AWQ tensors; `packing_format` says which, and how zero
points are stored. Keys are those of AutoRound 0.15."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from recompile.errors import FormatError, UnsupportedError
from recompile.formats.awq import BITS as AWQ_BITS
from recompile.formats.awq import AwqScheme
from recompile.formats.gptq import GptqScheme
from recompile.formats.stored import Described, StoredModule
from recompile.io.patterns import Regex, compile_regex
from recompile.io.schema import describe

# packing_format -> (format of the tensors, GPTQ layout: v1 stores zero points minus one)
PACKINGS = {
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round:auto_awq": ("awq", ""),
}


def scheme_of(checkpoint: Described, module: StoredModule) -> GptqScheme | AwqScheme:
    """The scheme of a module by the checkpoint's config. Raises FormatError where it does not fit what is stored,
    UnsupportedError for packings that hold no GPTQ or AWQ tensors."""
    config = checkpoint.quantization_config
    packing = config.get("packing_format")
    if packing not in PACKINGS:
        raise UnsupportedError(
            f"{checkpoint.label}: packing_format {packing!r} in config.json: this version reads {', '.join(PACKINGS)}"
        )
    wanted, layout = PACKINGS[packing]
    if module.format != wanted:
        raise FormatError(
            f"{checkpoint.label}: {module.name} is stored as {module.format}, and packing_format {packing!r} in "
            f"config.json means {wanted}"
        )
    try:
        values = read_values(config, module.name)
        group_size = None if values["group_size"] in (None, -1) else values["group_size"]
        if wanted == "gptq":
            return GptqScheme(values["bits"], group_size, values["sym"], layout)
        if values["bits"] != AWQ_BITS:
            raise FormatError(f"bits: found {values['bits']!r}, wanted {AWQ_BITS} for AWQ")
        return AwqScheme(group_size)
    except FormatError as error:
        raise FormatError(f"{checkpoint.label}: config of {module.name}: {error}") from error


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Regex:
    return compile_regex(pattern, "extra_config")


def read_values(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """`bits`, `group_size` and `sym` of a module: the base values, changed by `extra_config` under the module's exact
    name, else under the first regex found in it. Raises FormatError for a module that is not to be quantized."""
    values = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"extra_config: found {describe(extra)}, wanted an object")
    overrides = extra.get(module)
    if overrides is None:
        overrides = next((extra[pattern] for pattern in extra if _compiled(str(pattern)).search(module)), {})
    if not isinstance(overrides, Mapping):
        raise FormatError(f"extra_config: found {overrides!r}, wanted an object")
    values |= {key: overrides[key] for key in values if overrides.get(key) is not None}
    bits = values["bits"]
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise FormatError(f"bits: found {bits!r}, wanted a whole number")
    if bits >= 16:
        raise FormatError(f"bits: found {bits}, which says that it is not quantized, and it is stored quantized")
    return values
