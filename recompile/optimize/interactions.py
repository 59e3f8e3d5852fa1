"""What the errors of different groups cost together, from the draws that `model_profile --pairs` keeps.

With G_d the gradient of a Fisher sample, <G_d, e_a> <G_d, e_b> is e_a' F e_b in expectation: what two errors, made
together, cost beyond the sum of each alone. One draw says next to nothing, and errors of two groups hardly correlate;
so the products of one half of the rows are compared with those of the other half, and all are scaled by the share that
the halves have in common (the shrinkage of James and Stein, "Estimation with quadratic loss", 1961, with its factor
from split halves, and from those to all rows by Spearman and Brown's formula, 1910).

Numbers only. `recompile.optimize.refine` predicts moves of several groups with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recompile.optimize.problem import Swap

PICKED = 1000  # swaps at most by whose pairs the share is found


@dataclass(frozen=True)
class Interactions:
    """Products of errors of two groups, nats per token.

    number: of a swap's row; draws: float32 [swaps, draws], such that the product of two rows is e_a' F e_b
    share: of such a product that other rows confirm, 0 to 1; every result is scaled by it
    """

    number: Mapping[Swap, int]
    draws: NDArray[np.float32]
    share: float

    @staticmethod
    def of(swaps: Sequence[Swap], products: NDArray[np.float32], row_tokens: int) -> Interactions:
        """products: [swaps, rows, samples], <G_d, e> over whole rows of so many tokens."""
        count, rows, samples = products.shape
        scaled = products.reshape(count, rows * samples) * np.float32((rows * samples * row_tokens) ** -0.5)
        return Interactions({swap: n for n, swap in enumerate(swaps)}, scaled, common_share(swaps, products))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(sorted(self.number.items())).encode())
        digest.update(np.ascontiguousarray(self.draws).tobytes())
        return digest.hexdigest()

    def between(self, before: Mapping[str, str], after: Mapping[str, str]) -> float:
        """What the moves between two choices cost together beyond what each costs alone."""
        moves = self._moves(before, after)
        if len(moves) < 2:
            return 0.0
        each = np.stack(list(moves.values()))
        whole = each.sum(0)
        return self.share * 0.5 * float(whole @ whole - np.vdot(each, each))

    def beside(self, before: Mapping[str, str], after: Mapping[str, str]) -> dict[Swap, float]:
        """What every swap would cost, made with the moves of the other groups, beyond what it costs alone."""
        moves = self._moves(before, after)
        whole = sum(moves.values(), np.zeros(self.draws.shape[1], np.float64))
        products = self.draws @ whole.astype(np.float32)
        found = {}
        for (group, source), number in self.number.items():
            here = self.number.get((group, before[group])) if group in before else None
            value = float(products[number]) - (float(products[here]) if here is not None else 0.0)
            if group in moves:
                own = self._error((group, source)) - self._error((group, before[group]))
                value -= float(own @ moves[group])
            found[group, source] = self.share * value
        return found

    def _moves(self, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
        return {
            name: self._error((name, source)) - self._error((name, before[name]))
            for name, source in after.items()
            if before[name] != source
        }

    def _error(self, swap: Swap) -> NDArray[np.float64]:
        """Of a swap that was not drawn, for it is what the others are differences from: none."""
        number = self.number.get(swap)
        return np.zeros(self.draws.shape[1]) if number is None else self.draws[number].astype(np.float64)


def common_share(swaps: Sequence[Swap], products: NDArray[np.float32]) -> float:
    """The share of the variance of products of two groups' errors that both halves of the rows agree on; 0 for a
    single row. products: [swaps, rows, samples]"""
    picked = np.random.default_rng(0).permutation(len(swaps))[:PICKED]  # equal in every run
    groups = np.array([swaps[number][0] for number in picked])
    one, other = (_correlations(products[picked][:, half::2]) for half in (0, 1))
    apart = groups[:, None] != groups[None, :]
    common = float((one * other)[apart].sum())
    all_of_it = float((one**2 + other**2)[apart].sum()) / 2
    half_share = common / all_of_it if all_of_it > 0 else 0.0
    return max(0.0, 2 * half_share / (1 + half_share))


def _correlations(products: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = products.reshape(len(products), -1).astype(np.float64)
    if not flat.size:
        return np.zeros((len(products), len(products)))
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    flat /= np.where(length > 0, length, 1.0)
    return flat @ flat.T
