"""What `quantization_config`, and MLX's `quantization`, may hold: types and ranges of the keys that formats read.

Keys that no format here reads are left alone, since every tool adds its own. A scheme is read later, by the format of
the module that it is of; here only what no method could mean is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from recompile.errors import CheckpointError
from recompile.io.printable import printable
from recompile.io.schema import describe, read_as

LARGEST_SIZE = 2**24  # of a group or a block of weights: wider than any matrix
MOST_BITS = 64


@dataclass(frozen=True)
class _Fields:
    """Top-level keys. None: absent or null."""

    quant_method: str | None = None
    quant_algo: str | None = None
    format: str | None = None
    quantization_status: str | None = None
    checkpoint_format: str | None = None
    packing_format: str | None = None
    activation_scheme: str | None = None
    desc_act: bool | None = None
    is_marlin_format: bool | None = None
    config_groups: Mapping[str, Any] | None = None
    ignore: tuple[str, ...] | None = None
    ignored_layers: tuple[str, ...] | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    tensor_storage: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Group:
    """Keys of one entry of `config_groups`."""

    targets: tuple[str, ...] | None = None
    weights: Mapping[str, Any] | None = None
    input_activations: Mapping[str, Any] | None = None
    output_activations: Mapping[str, Any] | None = None
    format: str | None = None


@dataclass(frozen=True)
class _MlxEntry:
    """What MLX says at the top of `quantization`, and of one path in it."""

    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None


def check_quantization_config(config: Any, place: str) -> Mapping[str, Any]:
    """The config as it is; {} for null. Raises CheckpointError naming the key that is not what formats read.

    place: file with directory, and the key: "m/config.json: quantization_config"
    """
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{place}: {describe(config)}, wanted an object")
    _check(_Fields, config, place)
    _check_ranges(config, place)
    for name, group in (config.get("config_groups") or {}).items():
        where = f"{place}: config_groups.{printable(str(name))[:60]}"
        if not isinstance(group, dict):
            if isinstance(group, str):  # ModelOpt and old compressed-tensors name presets; no reader takes them
                continue
            raise CheckpointError(f"{where}: {describe(group)}, wanted an object")
        _check(_Group, group, where)
        for key in ("weights", "input_activations", "output_activations"):
            _check_ranges(group.get(key) or {}, f"{where}: {key}")
    return config


def check_mlx_quantization(config: Any, place: str) -> None:
    """Raise CheckpointError naming the key of MLX's `quantization` that its loaders could not read.

    Null and text are left alone: other tools use that key for a name. place: "m/config.json: quantization"
    """
    if config is None or isinstance(config, str):
        return
    if not isinstance(config, dict):
        raise CheckpointError(f"{place}: {describe(config)}, wanted an object")
    entries = {f"{place}: {printable(str(path))[:60]}": value for path, value in config.items() if type(value) is dict}
    for where, values in {place: config, **entries}.items():
        _check(_MlxEntry, values, where)
        _check_ranges(values, where)


def _check(kind: type, values: Mapping[str, Any], place: str) -> None:
    known = {field.name for field in fields(kind)}
    read_as(kind, {key: value for key, value in values.items() if key in known}, place, error=CheckpointError)


def _check_ranges(values: Mapping[str, Any], place: str) -> None:
    """Widths and sizes that are numbers are in their range; another type is the format's to refuse or to read."""
    for key in ("bits", "w_bit", "num_bits", "head_bits"):
        value = values.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value <= MOST_BITS:
            raise CheckpointError(f"{place}: {key}: {describe(value)}, wanted a width above 0 and at most {MOST_BITS}")
    for key in ("group_size", "q_group_size"):
        value = values.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not -1 <= value <= LARGEST_SIZE:
            raise CheckpointError(f"{place}: {key}: {describe(value)}, wanted -1, or a size of at most 2^24")
    blocks = values.get("weight_block_size")
    if isinstance(blocks, list) and any(
        isinstance(size, (int, float)) and not 0 < size <= LARGEST_SIZE for size in blocks
    ):
        raise CheckpointError(f"{place}: weight_block_size: {str(blocks)[:60]}, wanted sizes from 1 to 2^24")
