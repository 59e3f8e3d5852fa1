"""Budgets in the words they are asked in, and what they mean in stored bits.

Numbers and text only; nothing here opens a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from recompile.costs import Profile, ProfileGroup
from recompile.errors import ArgumentError, BudgetError, RecompileError
from recompile.optimize.engine_constraints import is_routed_expert
from recompile.optimize.limits import Row
from recompile.optimize.problem import Problem
from recompile.recipe.recipe import Glob, suggest


@dataclass(frozen=True)
class Pool:
    """`--pool "gpu=GLOB,GLOB:3GiB"`: modules that live in one memory, and how much of it they may take."""

    name: str
    globs: tuple[str, ...]
    size_bytes: int
    other_bits: int = 0  # stored bits of what the globs name besides the profiled modules: norms, embedding

    def holds(self, module: str) -> bool:
        return any(glob.matches(name) for glob in map(Glob.parse, self.globs) for name in (module, f"{module}.weight"))


def split_pool(text: str) -> tuple[str, tuple[str, ...], str]:
    """(name, globs, size as written) of `NAME=GLOB,GLOB:SIZE`. Raises RecompileError."""
    found = re.fullmatch(r"\s*([^=\s]+)\s*=(.+):\s*([^:]+?)\s*", text)
    globs = tuple(glob.strip() for glob in found[2].split(",")) if found else ()
    if found is None or not all(globs):
        raise ArgumentError(f'{{pool}} "{text}": wanted NAME=GLOB,GLOB:SIZE, e.g. "gpu=*.self_attn.*:3GiB"')
    return found[1], globs, found[3]


def active_share(config: Mapping[str, Any]) -> Fraction:
    """Experts per token / number of experts, from a config.json. Raises RecompileError where it names no experts."""
    nested = config.get("text_config")
    found = {**config, **(nested if isinstance(nested, Mapping) else {})}
    chosen = next((found[key] for key in _PER_TOKEN if isinstance(found.get(key), int)), None)
    experts = next((found[key] for key in _EXPERTS if isinstance(found.get(key), int)), None)
    if not chosen or not experts:
        raise ArgumentError(
            f"{{active_bpw}}: config.json names no experts (none of {', '.join((*_PER_TOKEN, *_EXPERTS))}); "
            f"for a dense model it is the same as {{bits}}"
        )
    return Fraction(chosen, experts)


_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "num_selected_experts")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class Budget:
    """What a choice may take, in the words it was asked in.

    At most one of the first five is set; active_bpw and pools may stand beside a size. All that are set hold.
    """

    bpw: float | None = None  # bits per weight over quantized modules
    total_bpw: float | None = None  # over all weights, embedding, head and norms included
    size_bytes: int | None = None  # of all tensors
    max_kl: float | None = None  # nats per token, predicted or (measured.py) measured: the smallest size that keeps it
    max_ppl_increase: float | None = None  # 0.02 = 2 %: as max_kl = ln(1.02), see max_kl_for
    active_bpw: float | None = None  # bits per weight that takes part in a token
    active_share: Fraction = Fraction(1)  # of the routed experts, of a token
    pools: tuple[Pool, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.bpw, self.total_bpw, self.size_bytes, self.max_kl, self.max_ppl_increase)
        if sum(size is not None for size in sizes) > 1:
            raise ArgumentError("give one of {bits}, {total_bpw}, {size}, {max_kl} and {max_ppl_increase}")
        if self.max_ppl_increase is not None:
            object.__setattr__(self, "max_kl", max_kl_for(self.max_ppl_increase))
        if all(size is None for size in sizes) and self.active_bpw is None and not self.pools:
            raise ArgumentError(
                "give a budget: {bits} 3.5, {size} 4.2GiB, {total_bpw} 4.0, {max_kl} 0.02 or {pool} ..."
            )
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise RecompileError(f'two pools are called "{max(names, key=names.count)}"')

    @property
    def has_primary(self) -> bool:
        """Whether there is one size for all modules together."""
        return any(size is not None for size in (self.bpw, self.total_bpw, self.size_bytes))

    def describe(self) -> str:
        said = []
        if self.bpw is not None:
            said.append(f"{self.bpw:g} bpw over quantized modules")
        if self.total_bpw is not None:
            said.append(f"{self.total_bpw:g} bpw over all weights")
        if self.size_bytes is not None:
            said.append(f"{self.size_bytes} bytes")
        if self.max_ppl_increase is not None:
            said.append(f"perplexity {100 * self.max_ppl_increase:g} % up at most (KL {self.max_kl:.6g})")
        elif self.max_kl is not None:
            said.append(f"KL {self.max_kl:g} at most")
        if self.active_bpw is not None:
            said.append(f"{self.active_bpw:g} active bpw")
        said += [f"pool {pool.name} of {pool.size_bytes} bytes" for pool in self.pools]
        return " and ".join(said)

    def bits(self, profile: Profile) -> int:
        """The budget in stored bits of quantized modules."""
        header = profile.header
        if self.bpw is not None:
            return math.floor(self.bpw * profile.counted_weights + 1e-6)
        if self.total_bpw is not None:
            everything = profile.counted_weights + header.other_weights
            return math.floor(self.total_bpw * everything + 1e-6) - header.other_bits
        assert self.size_bytes is not None, "one field is set"
        return 8 * self.size_bytes - header.other_bits

    def spell_range(self, fewest: int, most: int, profile: Profile) -> str:
        """A range of stored bits of quantized modules, in the words of this budget. Rounded inwards, so that both ends
        can be asked for as they stand."""
        header = profile.header
        if self.size_bytes is not None:
            ends = (-(-(fewest + header.other_bits) // 8), (most + header.other_bits) // 8)
            return " to ".join(f"{size} bytes ({size / 2**30:.4f} GiB)" for size in ends)
        weights, more = max(1, profile.counted_weights), 0
        if self.total_bpw is not None:
            weights, more = weights + header.other_weights, header.other_bits
        low, high = (fewest + more) / weights, (most + more) / weights
        for digits in range(4, 16):
            lowest, highest = math.ceil(low * 10**digits), math.floor(high * 10**digits)
            if lowest <= highest:
                break
        in_all = " in all" if self.total_bpw is not None else ""
        return f"{lowest / 10**digits:.{digits}f} bpw to {highest / 10**digits:.{digits}f} bpw{in_all}"

    # ---- more than one limit ----

    def primary_row(self, profile: Profile, problem: Problem) -> Row:
        """The one size for all modules as a row."""
        use = {place: tuple(o.bits for o in group.options) for place, group in enumerate(problem.groups)}
        return Row(
            self.describe_primary(),
            use,
            self.bits(profile),
            problem.fixed_bits,
            lambda bits: self._spell(bits, profile),
        )

    def describe_primary(self) -> str:
        return Budget(self.bpw, self.total_bpw, self.size_bytes).describe()

    def _spell(self, bits: int, profile: Profile) -> str:
        return self.spell_range(bits, bits, profile).split(" to ")[0]

    def extra_rows(self, profile: Profile, problem: Problem) -> list[Row]:
        """The rows of active_bpw and the pools, for a prepared problem of this profile.

        Raises RecompileError for a pool that names nothing, modules in two pools or, where nothing else limits them, in
        none.
        """
        rows = self._pool_rows(profile, problem) if self.pools else []
        if self.active_bpw is not None:
            rows.append(self._active_row(profile, problem))
        return rows

    def _active_row(self, profile: Profile, problem: Problem) -> Row:
        header, share = profile.header, self.active_share
        assert self.active_bpw is not None, "asked for"
        part, whole = share.numerator, share.denominator  # use counts in 1/whole bits, so that it is whole numbers
        times: dict[str, int] = {}
        weights = whole * header.fixed_weights
        for group in header.groups:
            routed = [is_routed_expert(module) for module in group.modules]
            if any(routed) and not all(routed):
                raise RecompileError(
                    f'{{active_bpw}}: group "{group.name}" holds routed experts and other modules; profile with '
                    f"{{level}} "
                    f"block, fused or tensor"
                )
            times[group.name] = part if routed[0] else whole
            weights += times[group.name] * group.weights
        use = _member_use(profile, problem, times)
        limit = math.floor(Fraction(self.active_bpw).limit_denominator(10**9) * weights)
        count = max(1, weights)
        spell = f"{{:.4f}} active bpw (of {part}/{whole} of the experts)"
        return Row(
            f"{{active_bpw}} {self.active_bpw:g}",
            use,
            limit,
            whole * header.fixed_bits,
            lambda used: spell.format(used / count),
        )

    def _pool_rows(self, profile: Profile, problem: Problem) -> list[Row]:
        inside: dict[str, dict[str, int]] = {pool.name: {} for pool in self.pools}
        alone = not self.has_primary and self.active_bpw is None
        for group in profile.header.groups:
            homes = {module: [pool.name for pool in self.pools if pool.holds(module)] for module in group.modules}
            for module, found in homes.items():
                if len(found) > 1:
                    raise RecompileError(f"{{pool}}: {module} is in two pools, {found[0]} and {found[1]}")
            places = {found[0] if found else None for found in homes.values()}
            if len(places) > 1:
                named = ", ".join(str(place) if place else "none" for place in places)
                raise RecompileError(
                    f'{{pool}}: the modules of group "{group.name}" are in different pools ({named}); profile at a '
                    f"finer"
                    f" {{level}}"
                )
            (place,) = places
            if place is not None:
                inside[place][group.name] = 1
            elif alone:
                raise RecompileError(
                    f"{{pool}}: {group.modules[0]} is in no pool and nothing else limits it; name it in a pool, or give"
                    f" a size for all ({{bits}}, {{size}}) as well"
                )
        for pool in self.pools:
            if not inside[pool.name] and not pool.other_bits:
                raise RecompileError(
                    f'{{pool}} {pool.name}: "{",".join(pool.globs)}" matches nothing{_hint(pool, profile)}'
                )
        return [
            Row(
                f"{{pool}} {pool.name}",
                _member_use(profile, problem, inside[pool.name]),
                8 * pool.size_bytes,
                pool.other_bits,
                _bytes_of_bits,
            )
            for pool in self.pools
        ]


def _bytes_of_bits(bits: int) -> str:
    return f"{-(-bits // 8)} bytes ({bits / 8 / 2**30:.4f} GiB)"


def _hint(pool: Pool, profile: Profile) -> str:
    modules = [module for group in profile.header.groups for module in group.modules]
    near = suggest(pool.globs[0], modules)
    return f'; did you mean "{near}"?' if near else ""


def _member_use(profile: Profile, problem: Problem, times: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Number of a group of the problem -> what each option takes: the bits of those of its members that `times` names,
    as often as it says."""
    bits: Mapping[str, ProfileGroup] = {group.name: group for group in profile.header.groups}
    use = {}
    for place, group in enumerate(problem.groups):
        members: Sequence[str] = [member for member in group.members if member in times]
        if members:
            use[place] = tuple(
                sum(times[member] * bits[member].bits[option.source] for member in members) for option in group.options
            )
    return use


def max_kl_for(ppl_increase: float) -> float:
    """The KL at which perplexity is expected to rise by this share: ln(1 + share), nats per token.

    log(ppl of candidate / ppl of reference) is the mean of log p(x) - log q(x) over the text's own tokens x; KL is its
    mean over tokens drawn from p. They agree as far as the text is what the reference would say. Raises BudgetError for
    a share of 0 or less.
    """
    if not ppl_increase > 0:
        raise BudgetError(f"{{max_ppl_increase}} {ppl_increase:g}: wanted more than 0, e.g. 0.02 or 2%")
    return math.log1p(ppl_increase)


def parse_share(text: str) -> float:
    """ "2%" or "0.02" -> 0.02. Raises RecompileError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if found is None:
        raise ArgumentError(f'{{max_ppl_increase}} "{text}": wanted a share, e.g. 0.02 or 2%')
    return float(found[1]) / (100 if found[2] else 1)
