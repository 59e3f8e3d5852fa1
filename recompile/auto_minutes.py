"""How the minutes that `recompile.auto` may take in all are shared, and again once stages took what they took."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from recompile.planning import AutoPlan

DEFAULT_MINUTES = 18.0  # of a run on a small model that asks for nothing else
SMALL_WEIGHTS = 500_000_000
DEFAULT_OF_LEAST = 1.25  # of the least that is worth doing, which these minutes are at least
LEAST = (8, 4, 16)  # rows, samples, calibration rows
PASSES_SHARE = 0.6  # of the minutes, which passes take at most where fewer rows and draws will do
HEAL_SHARE, LEAST_HEAL_MINUTES = 0.6, 2.0  # of what is left; of steps, beside judging
LEAST_STEP_MINUTES = 0.5  # the same once a run has come to it
STEPS_SHARE = 1 / 3  # of healing then, at least: where judging takes nearly all of it, a step or two gain nothing
BEFORE_CHOOSING = ("trace", "profile")
LEAST_SEARCH_MINUTES = 0.5
MORE_SHARE = 0.75  # the same for more rows than were planned
HEAL_EARLY = 0.95  # of what is left: a verdict takes somewhat longer than its first look shows
LATE_SHARE = 0.9  # of the minutes, once search is done: builds are calibrated with as many rows as are made by then
QUICK = {"rows": 6, "length": 256, "samples": 8, "calibration_rows": 24}  # at most, of a first look
QUICK_SEARCH_MINUTES = 1.0
PACES = (0.3, 4.0)  # what a stage's time is believed to say of those to come, as a ratio to its plan


@dataclass(frozen=True)
class Split:
    """How so many minutes in all are spent: rows and draws, and minutes of the stages that end by the clock.

    heal: judging included; None where nothing is healed; minutes: in all
    """

    rows: int
    samples: int
    calibration_rows: int
    search_minutes: float
    heal: float | None
    minutes: float

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.rows, self.samples, self.calibration_rows


@dataclass(frozen=True)
class Asked:
    """What a run is asked for. counts: rows, samples and calibration rows; says_times: whether anything of this was
    said, so that a run without a limit has none; searches: whether the recipe may take minutes"""

    counts: tuple[int, int, int]
    minutes: float | None
    search_minutes: float | None
    heal: float | None
    says_times: bool
    searches: bool = True


def split_minutes(
    minutes: float,
    asked: tuple[int, int, int],
    passes: Callable[[int, int, int], float],
    heal: float | bool | None,
    judging: float = 0.0,
    least: tuple[int, int, int] = LEAST,
    searches: bool = True,
) -> Split:
    """asked: rows, samples and calibration rows, which are halved in turn until the passes leave room for the rest;
    passes: seconds of all stages with so many, those that are done too, without search and healing
    heal: minutes that were asked for; True: a share of what is left; None or False: nothing is healed
    judging: seconds of healing that move nothing, with the rows that are asked for; least: to which rows, samples and
    calibration rows may fall; searches: whether some minutes are for that
    """
    counts = list(asked)
    while passes(counts[0], counts[1], counts[2]) > PASSES_SHARE * 60 * minutes:
        could = [n for n in (1, 0, 2) if counts[n] > least[n]]  # draws first: rows are worth more
        if not could:
            break
        most = max(could, key=lambda n: counts[n] / least[n])
        counts[most] = max(least[most], counts[most] // 2)
    left = max(0.0, minutes - passes(counts[0], counts[1], counts[2]) / 60)
    judging *= counts[0] / asked[0]
    healing: float | None = None
    if heal is True:
        search = LEAST_SEARCH_MINUTES if searches else 0.0
        share = max((HEAL_SHARE if searches else 1.0) * left, min(left - search, LEAST_HEAL_MINUTES + judging / 60))
        healing = share if share >= LEAST_HEAL_MINUTES + judging / 60 else None
    elif heal:
        healing = heal
    search = max(LEAST_SEARCH_MINUTES, left - (healing or 0.0)) if searches else 0.0
    heals = None if healing is None else round(healing, 2)
    return Split(counts[0], counts[1], counts[2], round(search, 2), heals, minutes)


def default_minutes(full: float, least: float, weights: int) -> float | None:
    """What a run that says nothing takes in all: None, no limit, where all of it fits, and for models that are not
    small, of whose users more patience is expected.

    full, least: seconds of all stages with the rows and draws that are asked for, and with the fewest
    """
    limit = max(DEFAULT_MINUTES, float(math.ceil(DEFAULT_OF_LEAST * least / 60)))
    return limit if weights < SMALL_WEIGHTS and full > 60 * limit else None


class Shares:
    """The minutes in all of a run, shared before it begins, again as stages are done, and with healing last."""

    def __init__(
        self, asked: Asked, plan: Callable[[int, int, int], AutoPlan], judging: float, weights: int = 0
    ) -> None:
        """plan: of so many rows, samples and calibration rows, without search and healing; judging: as in
        `split_minutes`, of the rows that are asked for; weights: of the model"""
        self.asked, self.plan, self.judging, self.weights = asked, plan, judging, weights

    def first(self) -> Split | None:
        """None where there is no limit."""
        asked, minutes = self.asked, self.asked.minutes
        if minutes is None and not asked.says_times:
            least = self.plan(*LEAST).seconds
            minutes = default_minutes(self.plan(*asked.counts).seconds, least, self.weights)
        if minutes is None:
            return None

        def passes(rows: int, samples: int, calibration_rows: int) -> float:
            return self.plan(rows, samples, calibration_rows).seconds

        return split_minutes(minutes, asked.counts, passes, self._heal, self.judging, searches=asked.searches)

    @cached_property
    def unlimited(self) -> float | None:
        """Minutes in all that leave every row and draw; None where minutes were asked for."""
        if self.asked.minutes is not None:
            return None
        return math.ceil(self.plan(*self.asked.counts).seconds / (60 * PASSES_SHARE))

    def again(self, split: Split, seconds: Mapping[str, float]) -> Split:
        """What is still open, now that the profile has shown how fast this machine is. seconds: of the stages that are
        done, by name"""
        speed = pace(self.plan(*split.counts), seconds, BEFORE_CHOOSING)
        spent = sum(seconds.values())

        def passes(rows: int, samples: int, calibration_rows: int) -> float:
            stages = self.plan(rows, samples, calibration_rows).stages
            return spent + speed * sum(stage.seconds for stage in stages if stage.name not in BEFORE_CHOOSING)

        rows, samples, calibration_rows = split.counts
        judging = speed * self.judging * rows / self.asked.counts[0]
        least = (rows, samples, min(LEAST[2], calibration_rows))
        found = split_minutes(split.minutes, split.counts, passes, self._heal, judging, least, self.asked.searches)
        given = self.asked.search_minutes
        return found if given is None else replace(found, search_minutes=given)

    def calibrating(self, split: Split, seconds: Mapping[str, float]) -> Split:
        """With as many calibration rows as are done in time, now that the recipe is there: more than were planned where
        that leaves enough for healing. seconds: as in `again`"""
        plan, spent = self.plan(*split.counts), sum(seconds.values())
        speed, rows = pace(plan, seconds, BEFORE_CHOOSING), self.asked.counts[2]

        def ends(rows: int) -> float:
            stages = self.plan(split.rows, split.samples, rows).stages
            return spent + speed * sum(stage.seconds for stage in stages if stage.name not in seconds)

        while rows > split.calibration_rows and ends(rows) > MORE_SHARE * 60 * split.minutes:
            rows = max(split.calibration_rows, rows // 2)
        while rows > LEAST[2] and ends(rows) > LATE_SHARE * 60 * split.minutes:
            rows = max(LEAST[2], rows // 2)
        return replace(split, calibration_rows=rows)

    def affords_uniform(self, split: Split, seconds: Mapping[str, float]) -> bool:
        """Whether a uniform build, which takes what the mix took, and the comparison end in time."""
        plan = self.plan(*split.counts)
        after = sum(stage.seconds for stage in plan.stages if stage.name in ("pick", "verify"))
        needed = seconds["build"] + pace(plan, seconds, BEFORE_CHOOSING) * after
        return sum(seconds.values()) + needed <= 60 * split.minutes

    def healing(self, split: Split, seconds: Mapping[str, float]) -> float | None:
        """Minutes of it, once all but it and what comes after it is done; None where too few are left."""
        if self.asked.heal is not None:
            return self.asked.heal
        plan = self.plan(*split.counts)
        last = next(stage.seconds for stage in plan.stages if stage.name == "verify")
        speed = pace(plan, seconds, ("pick",) if "pick" in seconds else ("build",))
        left = HEAL_EARLY * (split.minutes - (sum(seconds.values()) + speed * last) / 60)
        judging = speed * self.judging * split.rows / self.asked.counts[0]
        steps = left - judging / 60
        return round(left, 2) if steps >= max(LEAST_STEP_MINUTES, STEPS_SHARE * left) else None

    @property
    def _heal(self) -> float | bool:
        return True if self.asked.heal is None else self.asked.heal


def first_look(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is less of everything, of the arguments of `recompile.auto`."""
    less: dict[str, Any] = {name: min(values[name], most) for name, most in QUICK.items()}
    if values["search_minutes"] is None:
        less["search_minutes"] = QUICK_SEARCH_MINUTES
    if values["rounding"] is None and not values["variants"]:
        less["rounding"] = "one-sided"
    if values["solver"] is None:
        less["solver"] = "refine"  # which is the default only where the recipe is checked
    return {**less, "verify": False, "compensate": False, "checks_recipe": False, "feedback": False}


def pace(plan: AutoPlan, seconds: Mapping[str, float], names: Collection[str]) -> float:
    """What stages took beside what the plan says of them; 1.0 where none of these was run."""
    planned = sum(stage.seconds for stage in plan.stages if stage.name in names and stage.name in seconds)
    took = sum(seconds[name] for name in names if name in seconds)
    return min(max(took / planned, PACES[0]), PACES[1]) if planned > 0 and took > 0 else 1.0
