"""How engines store the keys and values that attention reads again: names, bits, and what a user may ask for. No torch.

parse_cache("8")            exllamav3, -cq 8
parse_cache("8,6")          exllamav3, keys of 8 bits and values of 6
parse_cache("q8_0,q4_0")    llama.cpp, -ctk q8_0 -ctv q4_0
parse_cache("ik:q8_0")      ik_llama.cpp, which does not rotate keys and values before it stores them
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from recompile.errors import ArgumentError
from recompile.formats.gguf_types import TYPES

EXLLAMA, LLAMA, IK = "exllamav3", "llama.cpp", "ik_llama.cpp"
GROUP = 32  # values that share a scale, in all three engines; runs along the head dimension
EXLLAMA_BITS = range(2, 9)
EXLLAMA_SCALE_BITS = 16 / GROUP  # a float16 for each group
# What llama.cpp takes for -ctk and -ctv (common/arg.cpp: kv_cache_types).
LLAMA_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_LLAMA_QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_ALL_BITS = tuple(str(bits) for bits in reversed(EXLLAMA_BITS))
SWEEPS = {
    EXLLAMA: _ALL_BITS,
    LLAMA: ("q8_0", "q8_0,q5_1", "q8_0,q4_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
    f"{EXLLAMA}-grid": tuple(f"{keys},{values}" for keys in _ALL_BITS for values in _ALL_BITS),
    f"{LLAMA}-grid": tuple(f"{keys},{values}" for keys in _LLAMA_QUANTIZED for values in _LLAMA_QUANTIZED),
}


@dataclass(frozen=True)
class CacheFormat:
    """One way to store a cache.

    engine: whose; keys, values: its names of the types: bits from "2" to "8" for exllamav3, else GGUF types
    """

    engine: str
    keys: str
    values: str

    @property
    def name(self) -> str:
        """As the user writes it: "8,6", "q8_0", "ik:q8_0,q4_0"."""
        types = self.keys if self.keys == self.values else f"{self.keys},{self.values}"
        return f"ik:{types}" if self.engine == IK else types

    @property
    def flags(self) -> str:
        """What the engine is started with."""
        if self.engine == EXLLAMA:
            return f"-cq {self.name}"
        return f"-ctk {self.keys} -ctv {self.values}" + (" -fa on" if is_quantized(self.values) else "")

    @property
    def key_bits(self) -> float:
        """Stored bits a value, scales included."""
        return stored_bits(self.keys)

    @property
    def value_bits(self) -> float:
        """Stored bits a value, scales included."""
        return stored_bits(self.values)


def stored_bits(kind: str) -> float:
    """Bits a value of one type of a cache, scales included."""
    if kind.isdigit():
        return int(kind) + EXLLAMA_SCALE_BITS
    return TYPES[kind.upper()].bits_per_weight(GROUP)


def is_quantized(kind: str) -> bool:
    """Whether a type is more than a float of some width."""
    return kind not in ("f32", "f16", "bf16")


def parse_cache(text: str, name: str = "{cache_quant}") -> CacheFormat:
    """What a user writes for a cache. name: of the argument, for messages. Raises ArgumentError."""
    engine, colon, types = text.strip().lower().rpartition(":")
    keys, comma, values = types.partition(",")
    keys, values = keys.strip(), (values if comma else keys).strip()
    if colon and engine not in ("ik", IK):
        raise ArgumentError(f'{name}: "{text}" begins with "{engine}:"; the only engine to be named is ik')
    for kind in (keys, values):
        _check_type(kind, text, name)
    numbers = {kind.isdigit() for kind in (keys, values)}
    if len(numbers) == 2 or (colon and True in numbers):
        raise ArgumentError(
            f'{name}: "{text}" mixes types of two engines; give bits (exllamav3) or types (llama.cpp) for both keys '
            f"and values"
        )
    return CacheFormat(EXLLAMA if numbers == {True} else IK if colon else LLAMA, keys, values)


def _check_type(kind: str, text: str, name: str) -> None:
    if kind in LLAMA_TYPES or (kind.isdigit() and int(kind) in EXLLAMA_BITS):
        return
    nearest = difflib.get_close_matches(kind, LLAMA_TYPES, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ArgumentError(
        f'{name}: "{text}": no engine stores a cache as "{kind}"{hint}; wanted bits from {EXLLAMA_BITS[0]} to '
        f"{EXLLAMA_BITS[-1]} as exllamav3 has them, or one of {', '.join(LLAMA_TYPES)} as llama.cpp has them; "
        f"KEYS,VALUES where they differ"
    )


def parse_sweep(given: Sequence[str], name: str = "{cache_sweep}") -> tuple[CacheFormat, ...]:
    """Caches of a sweep, each once, in the order given; "exllamav3" and "llama.cpp" stand for lists of their own,
    "exllamav3-grid" and "llama.cpp-grid" for every kind of keys with every kind of values.

    Raises ArgumentError."""
    texts = [text for item in given for text in SWEEPS.get(item.strip().lower(), (item,))]
    return tuple(dict.fromkeys(parse_cache(text, name) for text in texts))
