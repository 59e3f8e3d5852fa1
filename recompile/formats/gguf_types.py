"""The tensor types of GGUF files: one row each, mainline's and ik_llama.cpp's. Imports no torch.

Sizes from the GGUF and ik quants format specs. A quantized row runs along the fastest axis, `ne[0]`; rows are
independent of each other except in the interleaved types, which are only ever copied whole.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from recompile.errors import FormatError


@dataclass(frozen=True)
class GgufType:
    """One tensor type.

    name:        as llama.cpp spells it, upper case
    type_id:     its number in a tensor info
    block:       weights of a block; a row must hold whole blocks
    block_bytes: bytes of a block
    head_bytes:  bytes before the blocks of every row (some types of the fork keep the row's scale there)
    rows:        rows that are stored interleaved; such tensors are opaque and never cut
    fork:        True where only ik_llama.cpp knows the type
    """

    name: str
    type_id: int
    block: int
    block_bytes: int
    head_bytes: int = 0
    rows: int = 1
    fork: bool = False

    def fits(self, columns: int) -> bool:
        """Whether rows of this many weights can be stored in this type."""
        return columns > 0 and columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Stored bytes of a row of this many weights, a multiple of the block."""
        return self.head_bytes + columns // self.block * self.block_bytes

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of such a row, its head included."""
        return 8 * self.row_bytes(columns) / columns

    @property
    def is_float(self) -> bool:
        """Whether values are stored as they are: F32, F16, BF16, F64."""
        return self.name in FLOAT_TYPES

    @property
    def is_quantized(self) -> bool:
        return self.name not in PLAIN_TYPES


FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})
PLAIN_TYPES = FLOAT_TYPES | {"I8", "I16", "I32", "I64"}

TYPES: dict[str, GgufType] = {
    row.name: row
    for row in (
        GgufType("F32", 0, 1, 4),
        GgufType("F16", 1, 1, 2),
        GgufType("Q4_0", 2, 32, 18),
        GgufType("Q4_1", 3, 32, 20),
        GgufType("Q5_0", 6, 32, 22),
        GgufType("Q5_1", 7, 32, 24),
        GgufType("Q8_0", 8, 32, 34),
        GgufType("Q2_K", 10, 256, 84),
        GgufType("Q3_K", 11, 256, 110),
        GgufType("Q4_K", 12, 256, 144),
        GgufType("Q5_K", 13, 256, 176),
        GgufType("Q6_K", 14, 256, 210),
        GgufType("IQ2_XXS", 16, 256, 66),
        GgufType("IQ2_XS", 17, 256, 74),
        GgufType("IQ3_XXS", 18, 256, 98),
        GgufType("IQ1_S", 19, 256, 50),
        GgufType("IQ4_NL", 20, 32, 18),
        GgufType("IQ3_S", 21, 256, 110),
        GgufType("IQ2_S", 22, 256, 82),
        GgufType("IQ4_XS", 23, 256, 136),
        GgufType("I8", 24, 1, 1),
        GgufType("I16", 25, 1, 2),
        GgufType("I32", 26, 1, 4),
        GgufType("I64", 27, 1, 8),
        GgufType("F64", 28, 1, 8),
        GgufType("IQ1_M", 29, 256, 56),
        GgufType("BF16", 30, 1, 2),
        GgufType("TQ1_0", 34, 256, 54),
        GgufType("TQ2_0", 35, 256, 66),
        GgufType("MXFP4", 39, 32, 17),
        GgufType("NVFP4", 40, 64, 36),
        GgufType("Q1_0", 41, 128, 18),
        GgufType("Q2_0", 42, 64, 18),
        # ik_llama.cpp
        GgufType("Q6_0", 133, 32, 26, fork=True),
        GgufType("IQ1_BN", 134, 64, 13, 2, fork=True),
        GgufType("IQ2_BN", 135, 64, 16, 4, fork=True),
        GgufType("IQ2_K", 137, 256, 76, fork=True),
        GgufType("IQ3_K", 138, 256, 110, fork=True),
        GgufType("IQ4_K", 139, 256, 144, fork=True),
        GgufType("IQ5_K", 140, 256, 176, fork=True),
        GgufType("IQ6_K", 141, 256, 212, fork=True),
        GgufType("IQ4_KS", 144, 256, 136, 4, fork=True),
        GgufType("IQ2_KS", 145, 256, 70, 2, fork=True),
        GgufType("IQ4_KSS", 146, 256, 128, 4, fork=True),
        GgufType("Q8_KV", 151, 32, 32, 8, fork=True),
        GgufType("IQ5_KS", 152, 256, 168, 4, fork=True),
        GgufType("IQ2_KT", 153, 256, 68, 4, fork=True),
        GgufType("IQ3_KT", 154, 256, 100, 4, fork=True),
        GgufType("IQ4_KT", 155, 256, 128, 4, fork=True),
        GgufType("IQ3_KS", 156, 256, 102, 2, fork=True),
        GgufType("IQ2_KL", 157, 256, 86, 2, fork=True),
        GgufType("IQ1_KT", 158, 256, 56, 4, fork=True),
        # its row-interleaved repacks
        GgufType("Q4_0_R8", 202, 32, 18, rows=8, fork=True),
        GgufType("Q5_0_R4", 206, 32, 22, rows=4, fork=True),
        GgufType("Q8_0_R8", 208, 32, 34, rows=8, fork=True),
        GgufType("Q2_K_R4", 210, 256, 84, rows=4, fork=True),
        GgufType("Q3_K_R4", 211, 256, 110, rows=4, fork=True),
        GgufType("Q4_K_R4", 212, 256, 144, rows=4, fork=True),
        GgufType("Q5_K_R4", 213, 256, 176, rows=4, fork=True),
        GgufType("Q6_K_R4", 214, 256, 210, rows=4, fork=True),
        GgufType("IQ2_XXS_R4", 216, 256, 66, rows=4, fork=True),
        GgufType("IQ2_XS_R4", 217, 256, 74, rows=4, fork=True),
        GgufType("IQ3_XXS_R4", 218, 256, 98, rows=4, fork=True),
        GgufType("IQ1_S_R4", 219, 32, 6, 2, rows=4, fork=True),
        GgufType("IQ4_NL_R4", 220, 32, 18, rows=4, fork=True),
        GgufType("IQ3_S_R4", 221, 256, 110, rows=4, fork=True),
        GgufType("IQ2_S_R4", 222, 256, 82, rows=4, fork=True),
        GgufType("IQ4_XS_R8", 223, 256, 136, rows=8, fork=True),
        GgufType("IQ1_M_R4", 229, 32, 7, 2, rows=4, fork=True),
        GgufType("BF16_R16", 230, 1, 2, rows=16, fork=True),
        GgufType("Q6_0_R4", 233, 32, 26, rows=4, fork=True),
        GgufType("IQ2_BN_R4", 335, 64, 16, 4, rows=4, fork=True),
        GgufType("IQ2_K_R4", 337, 256, 76, rows=4, fork=True),
        GgufType("IQ3_K_R4", 338, 256, 110, rows=4, fork=True),
        GgufType("IQ4_K_R4", 339, 256, 144, rows=4, fork=True),
        GgufType("IQ5_K_R4", 340, 256, 176, rows=4, fork=True),
        GgufType("IQ4_KS_R4", 344, 256, 136, 4, rows=4, fork=True),
        GgufType("IQ5_KS_R4", 352, 256, 168, 4, rows=4, fork=True),
        GgufType("Q8_K_R16", 397, 256, 258, rows=16, fork=True),
        GgufType("Q8_KV_R8", 398, 32, 32, 4, rows=8, fork=True),
        GgufType("Q8_K_R8", 399, 256, 258, rows=8, fork=True),
    )
}
BY_ID: dict[int, GgufType] = {row.type_id: row for row in TYPES.values()}
QUANTIZED_TYPES = frozenset(name for name, row in TYPES.items() if row.is_quantized)


def find_type(name: str) -> GgufType:
    """The row of this name, in any case. Raises FormatError with the nearest name for any other."""
    found = TYPES.get(name.upper())
    if found is None:
        nearest = difflib.get_close_matches(name.upper(), TYPES, 1, 0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise FormatError(f"GGUF type: found {name!r}, which llama.cpp and ik_llama.cpp do not have{hint}")
    return found


# `general.file_type` of a file that holds mostly this type: plain types, the "S" preset of K types (all tensors alike).
# It is what listings show; engines load whatever the tensor infos say.
FILE_TYPES: dict[str, int] = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24,
    "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
    "Q6_0": 135, "IQ1_BN": 136, "IQ2_BN": 137, "IQ2_K": 138, "IQ3_K": 139, "IQ4_K": 140, "IQ5_K": 141, "IQ6_K": 142,
    "IQ4_KS": 145, "IQ2_KS": 147, "IQ4_KSS": 148, "Q8_KV": 149, "IQ5_KS": 150, "IQ2_KT": 151, "IQ3_KT": 152,
    "IQ4_KT": 153, "IQ3_KS": 154, "IQ2_KL": 155, "IQ1_KT": 156,
}  # fmt: skip
