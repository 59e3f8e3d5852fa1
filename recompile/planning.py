"""What `recompile.auto` is about to do: a preset for an engine, and a plan with predicted times, made from headers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from recompile.arguments import spell
from recompile.errors import ArgumentError
from recompile.formats import FORMATS
from recompile.formats.compressed_tensors import QUANT_METHOD
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.io.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Target:
    """What is made for an engine unless it is said otherwise.

    candidates: as `recompile.profile` takes them; rules: the engine whose rules the choice keeps, None where the format
    alone decides; packages: what making it needs, each with the extra that brings it
    """

    format: str
    candidates: tuple[str, ...]
    rules: str | None = None
    packages: tuple[tuple[str, str], ...] = ()
    note: str = ""


def _format_of(engine: str) -> str:
    """The name of the format that only this engine loads."""
    return next(spec.name for spec in FORMATS.values() if spec.engine == engine)


TARGETS: Mapping[str, Target] = {
    "llama.cpp": Target(
        "gguf",
        ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
        "llama.cpp",
        (("gguf", "gguf"), ("libgguf", "gguf")),
    ),
    "exllamav2": Target(_format_of("exllamav2"), ("2", "2.5", "3", "3.5", "4", "5", "6"), note="loads with CUDA"),
    "exllamav3": Target(
        _format_of("exllamav3"),
        ("2", "3", "4", "5", "6"),
        "exllamav3",
        (("numba", _format_of("exllamav3")),),
        note="loads with CUDA",
    ),
    # as mlx-lm's own quantization has them, the embedding and the head are quantized, so they are chosen as well
    MLX: Target(MLX, ("2", "3", "4", "5", "6", "8")),
    "vllm": Target(QUANT_METHOD, ("4", "8"), "vllm", note="other widths have no kernel everywhere"),
    "transformers": Target(QUANT_METHOD, ("2", "3", "4", "5", "6", "8"), "transformers"),
}


def target_of(engine: str) -> Target:
    """Raises ArgumentError for an engine that is not in the table."""
    if engine not in TARGETS:
        raise ArgumentError(f'{{engine}} "{engine}": wanted one of {", ".join(TARGETS)}')
    return TARGETS[engine]


@dataclass(frozen=True)
class PlannedStage:
    """One stage: what it does and how long it may take, in seconds on this machine, to a factor of two or so."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True)
class AutoPlan:
    """Everything that is known before the first stage. missing: what has to be there first, a sentence each."""

    engine: str | None
    format: str
    candidates: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    memory_bytes: int  # about; what is held at once beside the libraries
    missing: tuple[str, ...]
    note: str = ""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        said = {"missing": [spell(text, {}) for text in self.missing], "note": spell(self.note, {})}
        return {**asdict(self), **said, "seconds": self.seconds}

    def __str__(self) -> str:
        return spell(self.text, {})

    @property
    def text(self) -> str:
        """For people; names arguments as recompile.arguments has it."""
        target = f" for {self.engine}" if self.engine else ""
        lines = [f"Plan: {self.format}{target}, candidates {', '.join(self.candidates)}; about "
                 f"{format_seconds(self.seconds)} and {format_bytes(self.memory_bytes)} of memory"]  # fmt: skip
        width = max(len(stage.name) for stage in self.stages)
        lines += [
            f"  {stage.name:{width}}  about {format_seconds(stage.seconds):>8}  {stage.what}" for stage in self.stages
        ]
        lines += [f"  note: {self.note}"] if self.note else []
        lines += [f"  missing: {sentence}" for sentence in self.missing]
        return "\n".join(lines)


def missing_packages(target: Target) -> list[str]:
    """What making a target needs and this Python lacks, a sentence each."""
    extras: dict[str, list[str]] = {}
    for package, extra in target.packages:
        if importlib.util.find_spec(package) is None:
            extras.setdefault(extra, []).append(package)
    return [f"{' and '.join(packages)}: pip install 'recompile[{extra}]'" for extra, packages in sorted(extras.items())]


@dataclass(frozen=True)
class Sizes:
    """Of a dense checkpoint, from headers: weights of all maps but the head, of the head, and of its widths."""

    body: int
    head: int
    hidden: int
    layers: int
    cubes: int  # sum over maps of in x in x (in + out): what rounding with a Hessian costs

    @staticmethod
    def of(base: Checkpoint) -> Sizes:
        from recompile.checkpoint.module_names import role_of

        body = head = cubes = hidden = layers = 0
        for module in base.modules.values():
            if module.shape is None or len(module.shape) != 2:
                continue
            out, width = module.shape
            if role_of(module.name) == "layer":
                body += out * width
                cubes += width * width * (width + out)
                found = re.search(r"\.(\d+)\.", module.name)
                layers = max(layers, int(found[1]) + 1 if found else 0)
            elif out * width > head:
                head, hidden = out * width, width
        return Sizes(body, head, hidden, layers, cubes)


@functools.cache  # plans of one run are compared with each other
def flops_per_second(device: str = "cpu") -> float:
    """Multiplications and additions a second of a float32 matrix product here and now, the median of a third of a
    second: a machine that does something else at the same time will do so later too."""
    import torch

    left = torch.randn(512, 1024, device=device)
    right = torch.randn(1024, 1024, device=device)
    times: list[float] = []
    until = time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < until or len(times) < LEAST_PRODUCTS:
        started = time.perf_counter()
        float((left @ right)[0, 0])
        times.append(time.perf_counter() - started)
    return 2 * 512 * 1024 * 1024 / statistics.median(times)


MEASURED_SECONDS, LEAST_PRODUCTS = 0.3, 5
# Seconds of encoders that are no matrix products, a million weights on one core (scripts/bench_exl.py, bench_gguf.py).
ENCODER_SECONDS = {"exllamav3": 20.0, "exllamav2": 0.4, "llama.cpp": 0.5}
# The same of a candidate that is made on the fly: a grid fitted, or a GGUF type in the mean of those for llama.cpp
# (0.01 for Q8_0, 0.36 for IQ4_XS; Gemma 3 270M).
MAKING_SECONDS = {"exllamav2": 0.4, "llama.cpp": 0.16}
FITTING_SECONDS = 0.11
SLOWER_THAN_A_PRODUCT = 1.5  # what attention, norms, reading and small shapes cost on top (SmolLM2, 2 cores)
SKETCH_SLOWER = 1.2  # the same of a sketch, whose products are larger
FEEDBACK_SLOWER = 6.0  # column by column
SWEEP_SAMPLES = 8  # as eval.profile.sketch has them, which no plan loads
LOGIT_CHUNK_TOKENS, LOGITS_HELD = 256, 5  # of a pass: tokens whose logits are there at once, and how often
IMPORTANCE_ROWS, IMPORTANCE_LENGTH = 16, 512  # that inputs are weighed on for candidates but those of GGUF
PASSES_OF_A_BUILD = 5  # of the layers over the calibration rows: inputs, Hessians, and again once they are rounded
# The same where errors are compensated: a layer runs twice, its maps once each time as long as there is room for what
# they give; a second sum beside every Hessian.
PASSES_OF_A_COMPENSATED_BUILD = 8


def making_seconds(sizes: Sizes, form: str) -> float:
    """Making every module's weight of one candidate on the fly, once."""
    engine = "llama.cpp" if form == "gguf" else FORMATS[form].engine if form in FORMATS else None
    return MAKING_SECONDS.get(engine or "", FITTING_SECONDS) * sizes.body / 1e6 / (os.cpu_count() or 1)


def encoder_seconds(sizes: Sizes, form: str, rate: float, rounding: str | None) -> float:
    """Rounding every module once."""
    feedback = FEEDBACK_SLOWER * 2 * sizes.cubes / rate * (8 if rounding == "two-sided" else 1)
    engine = "llama.cpp" if form == "gguf" else FORMATS[form].engine if form in FORMATS else None
    each = ENCODER_SECONDS.get(engine or "", 0.0) * sizes.body / 1e6 / (os.cpu_count() or 1)
    return (0.0 if form == "gguf" and rounding is None else feedback) + each


def forward_seconds(sizes: Sizes, tokens: int, rate: float, head: bool = True) -> float:
    """One pass of so many tokens through all layers, and through the head where that is asked for."""
    return SLOWER_THAN_A_PRODUCT * 2 * (sizes.body + (sizes.head if head else 0)) * tokens / rate


def sketch_seconds(
    sizes: Sizes, tokens: int, samples: int, candidates: int, making: float, heads: int, rate: float
) -> float:
    """The sweeps of a sketch. Each runs the layers forward twice, multiplies inputs with the change of every candidate,
    which it makes for that, and pulls its samples back; its head costs two products whatever the samples, and three for
    each candidate of the head.

    making: seconds for one candidate; heads: candidates of the head
    """
    sweeps = -(-samples // SWEEP_SAMPLES)
    products = sweeps * (2 + candidates) + samples
    body = SKETCH_SLOWER * 2 * sizes.body * tokens / rate
    head = SLOWER_THAN_A_PRODUCT * 2 * sizes.head * tokens / rate
    return products * body + sweeps * (candidates * making + (2 + 3 * heads) * head)


def memory_bytes(sizes: Sizes, tokens: int) -> int:
    """States of the rows twice, two layers, the head and the logits of a chunk in float32."""
    layer = sizes.body // max(1, sizes.layers)
    logits = LOGITS_HELD * min(tokens, LOGIT_CHUNK_TOKENS) * (sizes.head // max(1, sizes.hidden))
    return 4 * (2 * tokens * sizes.hidden + 3 * layer + 2 * sizes.head + logits)


DEFAULT_SEARCH_MINUTES = 10.0  # of refine, where nothing is said
PROMPT_TOKENS = 220  # of a bundled prompt in the mean, its template included
TRACE_TOKENS = 256  # of a response at most
ONE_BY_ONE = 3.0  # what tokens that are written one after another take, of a pass over as many
VERIFIED_MIXES = 7  # the recipe, uniform and hand-made ones, greedy's and the exact one
STARTS, START_ROWS = 6, 8  # mixes that a search chooses its start from, and the rows that they are measured on
SOURCES_OF_A_MODULE = 2.5  # in mixes of one size that run together: what several have is made once
JUDGED_BY_HEAL = 12  # forward passes over rows of four roles, before and after


@dataclass(frozen=True)
class PlanOptions:
    """What a run is asked for, as far as its times follow from it.

    search_minutes: None: as long as the solver takes by itself; heal_minutes: None: nothing is healed
    builds: whether variants are made, or are there already; prompts: that the base answers first, for a trace, 0: none
    minutes: in all, where so many were asked for; unlimited: where they were not, how many would leave all rows
    checks_recipe: whether it is measured beside uniform and hand-made ones; feedback: candidates are rounded with it;
    note: what there is to say beside
    """

    rows: int
    length: int
    samples: int
    calibration_rows: int
    search_minutes: float | None
    solver: str | None
    rounding: str | None
    heal_minutes: float | None
    builds: bool
    verify: bool
    compensate: bool = False
    checks_recipe: bool = True
    feedback: bool = False
    prompts: int = 0
    device: str = "cpu"
    minutes: float | None = None
    unlimited: float | None = None
    note: str = ""


def make_plan(sizes: Sizes, engine: str | None, form: str, candidates: tuple[str, ...], asked: PlanOptions) -> AutoPlan:
    """Every stage with its time; a plan that takes longer than the minutes asked for says so.

    form: "gguf" or a format; candidates: what is chosen from, by name

    Times are those of the arithmetic at the rate of one matrix product, times what the passes measured beside it."""
    from recompile.model.devices import compute_device

    rate = flops_per_second(compute_device(asked.device))
    stages = _Stages(sizes, rate, form, candidates, asked).all()
    target = target_of(engine) if engine is not None else None
    notes = [note for note in (target.note if target is not None else "", asked.note) if note]
    if asked.minutes is not None:
        over = sum(stage.seconds for stage in stages) > 1.2 * 60 * asked.minutes
        longer = "; the least that can be done takes longer" if over else ""
        said = f"{asked.minutes:g} minutes in all were asked for{longer}"
        if asked.unlimited is not None:
            said = f"{asked.minutes:g} minutes in all; as precise as can be, and healed, with {{minutes}} "
            said += f"{asked.unlimited:g}"
        notes.append(said)
    found = missing_packages(target) if target is not None else []
    tokens = asked.length * max(asked.rows, asked.calibration_rows)
    return AutoPlan(
        engine,
        form,
        candidates,
        tuple(stages),
        memory_bytes(sizes, tokens) + (4 * (sizes.body + sizes.head) if asked.prompts else 0),
        tuple(found),
        "; ".join(notes),
    )


@dataclass(frozen=True)
class _Stages:
    """The stages of a run. rate: multiplications and additions a second."""

    sizes: Sizes
    rate: float
    form: str
    candidates: tuple[str, ...]
    asked: PlanOptions

    def all(self) -> list[PlannedStage]:
        build = self._build()
        return [
            *([self._trace()] if self.asked.prompts else []),
            self._profile(),
            self._recipe(),
            build,
            *([self._uniform(build.seconds)] if self._compares else []),
            *([self._pick()] if self._compares and self.asked.compensate else []),
            *([self._heal(self.asked.heal_minutes)] if self.asked.heal_minutes is not None else []),
            self._verify(),
        ]

    def _forward(self, tokens: int, head: bool = True) -> float:
        return forward_seconds(self.sizes, tokens, self.rate, head)

    @property
    def _tokens(self) -> int:
        return self.asked.rows * self.asked.length

    @property
    def _calibration(self) -> int:
        return self.asked.calibration_rows * self.asked.length

    @property
    def _making(self) -> float:
        made = self.asked.builds and not self.asked.feedback
        return making_seconds(self.sizes, self.form) if made else 0.0

    def _trace(self) -> PlannedStage:
        prompts = self.asked.prompts
        what = f"the base answers {prompts} prompts, at most {TRACE_TOKENS} tokens each; all its weights in memory"
        written = ONE_BY_ONE * self._forward(prompts * TRACE_TOKENS)
        return PlannedStage("trace", what, self._forward(prompts * PROMPT_TOKENS) + written)

    def _profile(self) -> PlannedStage:
        asked, count = self.asked, len(self.candidates)
        heads = count if self.form == MLX else 0
        seconds = sketch_seconds(self.sizes, self._tokens, asked.samples, count, self._making, heads, self.rate)
        weighing = self._calibration if self.form == "gguf" else IMPORTANCE_ROWS * IMPORTANCE_LENGTH
        seconds += self._forward(weighing, head=False) if asked.builds else 0.0
        what = f"a sketch, {asked.rows} rows x {asked.length} tokens, {asked.samples} draws each"
        if asked.feedback:
            seconds += PASSES_OF_A_BUILD * self._forward(asked.calibration_rows * IMPORTANCE_LENGTH, head=False)
            seconds += count * encoder_seconds(self.sizes, self.form, self.rate, "one-sided")
            held = format_bytes(rounded_bytes(self.sizes, self.candidates))
            what += f"; candidates rounded before with error feedback, {held} until the end"
        return PlannedStage("profile", what, seconds)

    def _recipe(self) -> PlannedStage:
        from recompile.optimize.solvers import SOLVERS

        solver, minutes = self.asked.solver, self.asked.search_minutes
        measures = solver is None or solver not in SOLVERS or SOLVERS[solver].runs_models
        search = 60 * (DEFAULT_SEARCH_MINUTES if minutes is None else minutes) if measures else 0.0
        if solver is None or solver == "refine":  # the start is chosen though there be no minute to search
            tokens = self.asked.length * min(self.asked.rows, START_ROWS)
            search = max(search, STARTS * self._forward(tokens) + SOURCES_OF_A_MODULE * self._making)
        what = "by these costs" if solver == "exact" else solver or "refine"
        mixes = VERIFIED_MIXES if self.asked.checks_recipe else 0
        what += f", and {mixes} mixes measured on rows of their own" if mixes else ""
        verified = mixes * self._forward(self._tokens) + (SOURCES_OF_A_MODULE * self._making if mixes else 0.0)
        return PlannedStage("recipe", what, search + verified)

    def _build(self) -> PlannedStage:
        if not self.asked.builds:
            return PlannedStage("build", "a merge", 0.0)
        two_sided = self.asked.rounding == "two-sided"
        seconds = encoder_seconds(self.sizes, self.form, self.rate, self.asked.rounding)
        passes = PASSES_OF_A_COMPENSATED_BUILD if self.asked.compensate else PASSES_OF_A_BUILD
        seconds += passes * self._forward(self._calibration, head=False)
        seconds += 3 * self._forward(self._calibration) if two_sided else 0.0
        what = f"one pass over {self.asked.calibration_rows} rows{', two-sided' if two_sided else ''}"
        what += ", errors compensated" if self.asked.compensate else ""
        return PlannedStage("build", what, seconds)

    @property
    def _compares(self) -> bool:
        return self.asked.verify and self.asked.builds

    def _heal(self, minutes: float) -> PlannedStage:
        seconds = max(60 * minutes, JUDGED_BY_HEAL * self._forward(self._tokens))
        return PlannedStage("heal", "scales, norms and biases against the base, and the verdict on it", seconds)

    def _uniform(self, build_seconds: float) -> PlannedStage:
        return PlannedStage("uniform", "a uniform build, made the same way", build_seconds)

    def _pick(self) -> PlannedStage:
        what = "both against the base on accept rows; the better one is written"
        return PlannedStage("pick", what, 3 * self._forward(self._tokens))

    def _verify(self) -> PlannedStage:
        builds = 1 + (self.asked.heal_minutes is not None) + (self._compares or not self.asked.builds)
        what = "the builds against the base on rows of their own"
        return PlannedStage("verify", what, (1 + builds) * self._forward(self._tokens))


def rounded_bytes(sizes: Sizes, candidates: Iterable[str]) -> int:
    """Of candidates that are kept on disk, about; names that are no bits count as 8."""
    bits = sum(float(name) if name.replace(".", "", 1).isdigit() else 8.0 for name in candidates)
    return int(bits * sizes.body / 8)


def judging_seconds(sizes: Sizes, rows: int, length: int, device: str) -> float:
    """What healing takes beside its steps: rows of so many tokens of every role, before and after."""
    from recompile.model.devices import compute_device

    rate = flops_per_second(compute_device(device))
    return JUDGED_BY_HEAL * forward_seconds(sizes, rows * length, rate)
