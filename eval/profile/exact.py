"""The layer-swap profile, exact: swap one group at a time and measure the end-to-end KL.

For a group in layer l only layers >= l run again, from the stored state that enters l; all candidates of a group (of
several groups where memory allows) go on together. The reference is run once: its post-norm hidden states are kept, and
what KL needs of its logits.

KL without the reference's logits. With z = W h (+ b) the logits and p the reference's probabilities,

    KL(p || q) = lse(z_q) - lse(z_p) - p . (z_q - z_p) = lse(z_q) - lse(z_p) - (W' p) . (h_q - h_p),

so per token one number (lse(z_p)) and one hidden-size vector (W' p) replace the vocabulary. Equal hidden states give
exactly 0. Heads that are not linear (soft caps), and swaps of the head itself, go the plain way over both logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.diff import versions
from eval.metrics import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES, kl_divergence
from recompile.checkpoint.checkpoint import Checkpoint, StoredModule, WeightSource, split_name
from recompile.checkpoint.coupled_modules import read_scaled_sets
from recompile.checkpoint.module_names import role_of
from recompile.costs import (
    Candidate,
    Journal,
    Measurement,
    Profile,
    ProfileGroup,
    ProfileHeader,
    candidate_label,
    check_candidates,
    group_name,
    is_expert,
    layer_index,
    open_journal,
)
from recompile.errors import MismatchError, MissingWeight, NotFiniteError, RecompileError
from recompile.io.memory import format_mib, keep_heap_small, process_bytes
from recompile.merge.overlay import account, build_overlay, check_same_model, quantizable
from recompile.model.activations import QuantizedInputs, quantizes_inputs
from recompile.model.counted import pick, places_of, row_means
from recompile.model.devices import batch_rows
from recompile.model.finite import check_finite
from recompile.model.roles import roles_of, stack_name
from recompile.model.stream import LayeredModel, check_same_skeleton
from recompile.model.tokens import Rows
from recompile.quantize.lazy_variant import MadeVariant, making_bytes
from recompile.recipe.recipe import Glob, SourceId, describe_spec

LOGIT_CHUNK_TOKENS = 256
HEAD_TOKENS = 512  # of one product with the head: fewer read its weights too often
FEW_EXPERTS = 4  # matrices of one or two experts: patched into the fused parameter; more: it is made anew


@dataclass(frozen=True)
class ProfileOptions:
    """What is swapped, into what, and how it is run."""

    level: str = "fused"
    context: str = "clean"
    match: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    head: bool = False  # the output head is a group
    embedding: bool = False
    dtype: torch.dtype | None = None
    device: str = "cpu"
    max_memory_bytes: int | None = None
    activations: bool = False  # swapped modules also see their inputs quantized as their schemes say (exact mode)


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, decided before it starts; all in bytes."""

    process: int  # the interpreter and its libraries, and what the allocator keeps
    states: int  # kept hidden states of the rows: reference, context, W'p
    working: int  # one layer, its activations, a chunk of logits
    resident_weights: int  # layers kept loaded, 0 = every layer is read again for every wave
    wave: int  # states of the swaps that run together
    swaps_per_wave: int

    @property
    def total(self) -> int:
        return self.process + self.states + self.working + self.resident_weights + self.wave


@dataclass(frozen=True)
class Started:
    """What a profile is about to measure."""

    plan: MemoryPlan
    total: int  # measurements, those found in the journal included
    resumed: int


@dataclass(frozen=True)
class Measured:
    """One swap is measured, or found in the journal."""

    measurement: Measurement
    done: int
    total: int


class SwappedSource:
    """A weight source with some modules taken from another one."""

    def __init__(self, base: WeightSource, modules: Iterable[str], other: WeightSource) -> None:
        self._base, self._modules, self._other = base, frozenset(modules), other
        self.label = getattr(base, "label", "")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._base.config

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        return {
            **self._base.modules,
            **{name: self._other.modules[name] for name in self._modules if name in self._other.modules},
        }

    def has(self, tensor: str) -> bool:
        return self._of(tensor).has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        return self._of(tensor).load(tensor, device=device)

    def _of(self, tensor: str) -> WeightSource:
        mine = tensor in self._modules or split_name(tensor)[0] in self._modules
        return self._other if mine else self._base


# ---- planning ------------------------------------------------------------------------------------------------------


def make_groups(
    candidates: Mapping[str, Checkpoint], options: ProfileOptions, unused: Collection[str] = ()
) -> tuple[ProfileGroup, ...]:
    """Group the modules that any candidate stores quantized. Pure: reads headers only.

    unused: modules that take no part in a forward pass of the text model (MTP layers, towers); they are in no group
    Raises MissingWeight where a candidate lacks a module, RecompileError where --match leaves nothing.
    """
    names: dict[str, list[str]] = {}
    roles = {"layer", *(["head"] if options.head else []), *(["embedding"] if options.embedding else [])}
    match = [Glob.parse(text) for text in options.match]
    skip = [Glob.parse(text) for text in options.skip]
    for module in dict.fromkeys(name for c in candidates.values() for name in c.modules):
        stored = [c.modules.get(module) for c in candidates.values()]
        if role_of(module) not in roles or not any(found is not None and found.is_quantized for found in stored):
            continue
        if module in unused or (role_of(module) == "layer" and layer_index(module) is None):
            continue
        if match and not any(_matches(glob, module) for glob in match):
            continue
        if any(_matches(glob, module) for glob in skip):
            continue
        for found, checkpoint in zip(stored, candidates.values(), strict=True):
            if found is None:
                raise MissingWeight(f"{checkpoint.label}: has no module {module}, which other candidates have")
        names.setdefault(group_name(module, options.level), []).append(module)
    if not names:
        raise RecompileError("no quantized module is left to profile; check {match} and {skip}, and the sources")
    groups = []
    for name, modules in names.items():
        bits = {label: sum(8 * c.modules[m].size_bytes for m in modules) for label, c in candidates.items()}
        first = next(iter(candidates.values()))
        weights = sum(first.modules[m].numel for m in modules)
        groups.append(ProfileGroup(name, tuple(modules), weights, bits, layer_index(modules[0])))
    return tuple(sorted(groups, key=lambda group: -1 if group.layer is None else group.layer))


def _matches(glob: Glob, module: str) -> bool:
    return glob.matches(module) or glob.matches(f"{module}.weight")


def describe_candidate(source: SourceId, checkpoint: Checkpoint, identified: bool = True) -> Candidate:
    """A source as a profile's header has it: where it lies, or what it is made as. identified: see ProfileJob.header"""
    identity = checkpoint.identity if identified else ""
    if isinstance(checkpoint, MadeVariant):
        how = describe_spec(checkpoint.spec), identity, dict(checkpoint.spec), checkpoint.rounded is not None
        return Candidate(source, *how)
    return Candidate(source, checkpoint.label, identity)


@dataclass(frozen=True, eq=False)
class ProfileJob:
    """What a profile is of: which swaps of which models, on which rows, and where it is kept.

    base:        the id of the base variant, one of `candidates`
    candidates:  (id, checkpoint) each
    ids:         int64 [rows, tokens]; rows_sha256, rows_source and the like say in the header where they come from
    path:        the journal
    counted:     bool [rows, tokens], the places whose KL counts; None: all
    """

    reference: Checkpoint
    base: SourceId
    candidates: Sequence[tuple[SourceId, Checkpoint]]
    ids: Tensor
    path: Path
    options: ProfileOptions = ProfileOptions()
    rows_sha256: str = ""
    rows_source: str = ""
    counted: Tensor | None = None
    rows_role: str = ""
    positions: str = "all"
    documents: tuple[str, ...] = ()

    @cached_property
    def by_label(self) -> dict[str, Checkpoint]:
        return {candidate_label(source): checkpoint for source, checkpoint in self.candidates}

    def over(self, rows: Rows, path: Path) -> ProfileJob:
        """The same of other rows, kept elsewhere."""
        return replace(
            self,
            ids=rows.ids,
            rows_sha256=rows.sha256,
            rows_source=rows.source,
            path=path,
            counted=rows.counted,
            rows_role=rows.role,
            positions=rows.positions,
            documents=rows.documents,
        )

    def first(self, rows: int) -> ProfileJob:
        """The same of the first rows."""
        counted = None if self.counted is None else self.counted[:rows]
        return replace(self, ids=self.ids[:rows], counted=counted, documents=self.documents[:rows])

    def model(self) -> LayeredModel:
        """The reference, with no weights loaded."""
        if self.options.max_memory_bytes is not None:
            keep_heap_small()  # before there is much to keep
        return LayeredModel.of(self.reference, dtype=self.options.dtype, device=self.options.device)

    def context(self, model: LayeredModel) -> LayeredModel:
        """The model that groups are swapped into: the reference itself, or the base variant.

        Raises MismatchError where the two are not built alike, RecompileError for an unknown context.
        """
        if self.options.context == "clean":
            return model
        if self.options.context != "base":
            raise RecompileError(f'context: found "{self.options.context}", wanted clean or base')
        base = self.by_label[candidate_label(self.base)]
        context = LayeredModel.of(base, dtype=model.dtype, device=self.options.device)
        check_same_skeleton(model, context)
        return context

    def header(
        self,
        dtype: torch.dtype,
        *,
        method: str = "exact",
        settings: Mapping[str, Any] | None = None,
        identified: bool = True,
    ) -> ProfileHeader:
        """Everything that decides a profile, from headers alone. Raises MismatchError for sources of another model.

        identified: with the hash of every byte of the models, which is read once a machine; False, for what is only
        looked at beforehand: without
        """
        described = tuple(describe_candidate(source, checkpoint, identified) for source, checkpoint in self.candidates)
        check_candidates(described)
        for checkpoint in self.by_label.values():
            check_same_model(self.reference, checkpoint)
            if read_scaled_sets(checkpoint.path):
                raise MismatchError(
                    f"{checkpoint.label}: scales were moved between its modules (awq, smoothquant), so that none can "
                    f"be swapped by itself; profile variants made by rtn, mse or gptq. A recipe by hand may take whole "
                    f"layers, attentions or MLPs of it"
                )
        runs = self.reference.config.get("model_type") is not None  # a GGUF file of any architecture has no model
        stack = f"{stack_name(self.reference)}." if runs else ""
        aside = {
            name
            for name, role in roles_of(self.reference).items()
            if role.part != "text" or (layer_index(name) is not None and not role.loader.startswith(stack))
        }
        groups = make_groups(self.by_label, self.options, aside)
        base = candidate_label(self.base)
        grouped = {module for group in groups for module in group.modules}
        counted = quantizable(self.by_label.values())
        fixed = account((m for m in self.by_label[base].modules.values() if m.name not in grouped), counted)
        return ProfileHeader(
            method=method,
            context=self.options.context,
            level=self.options.level,
            reference=self.reference.label,
            reference_fingerprint=self.reference.identity if identified else "",
            base=base,
            candidates=described,
            groups=groups,
            fixed_bits=fixed.quantized_bits,
            fixed_weights=fixed.quantized_weights,
            other_bits=fixed.total_bits - fixed.quantized_bits,
            other_weights=fixed.total_weights - fixed.quantized_weights,
            rows=len(self.ids),
            row_tokens=self.ids.shape[1],
            rows_sha256=self.rows_sha256,
            rows_source=self.rows_source,
            dtype=str(dtype).removeprefix("torch."),
            device=self.options.device,
            versions=versions(),
            settings={**(settings or {}), **({"padded": True} if self.counted is not None else {})},
            rows_role=self.rows_role,
            positions=self.positions,
            documents=self.documents,
        )

    def plan(self, model: LayeredModel, header: ProfileHeader) -> MemoryPlan:
        """Of exact swaps. Raises RecompileError if not even one swap fits below the cap."""
        return plan_memory(model, header, self.options.max_memory_bytes, making_bytes(self.by_label.values()))


def plan_memory(model: LayeredModel, header: ProfileHeader, cap_bytes: int | None, making: int = 0) -> MemoryPlan:
    """Decide what stays in memory. making: bytes that making a candidate on the fly takes (making_bytes).

    Raises RecompileError if not even one swap fits below the cap."""
    size = model.dtype.itemsize
    hidden = model.hidden_size
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    head = model.vocab_size * hidden
    state = header.rows * header.row_tokens * model.state_size(header.row_tokens) * size
    batch = batch_rows(model.device, header.row_tokens) * header.row_tokens
    widest = max(max(p.shape) for layer in model.layers for p in layer.parameters())
    activations = batch * (8 * hidden + 4 * widest) * size
    logits = 3 * min(LOGIT_CHUNK_TOKENS, header.row_tokens) * model.vocab_size * 4
    # a layer beside the stored and decoded copies of its largest weight, or the head beside its stored bytes
    swapped_head = 2 if any(group.layer is None for group in header.groups) else 0  # another one, as read and decoded
    with_head = (2 + swapped_head) * head * size + logits
    working = max(2 * max(per_layer) * size + activations, with_head) + making
    states = 4 * state + 2 * batch * hidden * size
    process = process_bytes(cap_bytes)
    smallest = process + states + working + state * max(len(g.bits) for g in header.groups)
    if cap_bytes is not None and smallest > cap_bytes:
        raise RecompileError(
            f"{{max_memory}} {format_mib(cap_bytes)} is too little: this run needs {format_mib(smallest)} "
            f"({format_mib(process)} program, {format_mib(states)} hidden states, {format_mib(working)} for one layer "
            f"or the head, the rest for one group's swaps); use fewer or shorter rows"
        )
    weights = (sum(per_layer) + head) * size
    swaps = max(len(g.bits) for g in header.groups)
    if cap_bytes is None or smallest + weights <= cap_bytes:
        return MemoryPlan(process, states, working, weights, swaps * state, swaps)
    # layers are read again for every wave: let a wave be as large as fits, up to all swaps of a layer
    room = (cap_bytes - process - states - working) // state
    return MemoryPlan(process, states, working, 0, room * state, room)


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass
class ReferenceTail:
    """What KL needs of the reference at the end of the model, per row.

    normed: [rows, tokens, hidden] post-norm states; lse: [rows, tokens] float64, log-sum-exp of its logits;
    projected: [rows, tokens, hidden], W'p; both None where the head is not linear
    """

    normed: Tensor
    lse: Tensor | None = None
    projected: Tensor | None = None


def log_sum_exp(head: torch.nn.Linear, states: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials of head(states); [rows, tokens, hidden] -> [rows, tokens] float64.

    Logits are made a slice of the vocabulary at a time, which stays in a core's cache and is never held as a whole.
    Each sum is taken below its maximum, so its error is float32's of the logarithm of a number near 1, not of the
    logits' size; slices are put together in float64."""
    return torch.cat([_log_sum_exp(head, piece) for piece in states.flatten(0, 1).split(HEAD_TOKENS)]).reshape(
        states.shape[:2]
    )


def _log_sum_exp(head: torch.nn.Linear, states: Tensor) -> Tensor:
    parts = []
    for weight, bias in _head_slices(head, len(states)):
        logits = torch.nn.functional.linear(states, weight, bias).float()
        top = logits.amax(-1, keepdim=True)
        parts.append(top[:, 0].double() + (logits - top).exp_().sum(-1).double().log())
    return torch.stack(parts).logsumexp(0)


def _mean_head_row(head: torch.nn.Linear, states: Tensor, lse: Tensor) -> Tensor:
    """W'p of every token, p the softmax of head(states) and lse what `log_sum_exp` says; [tokens, hidden]."""
    total = torch.zeros_like(states)
    for weight, bias in _head_slices(head, len(states)):
        logits = torch.nn.functional.linear(states, weight, bias).float()
        total += (logits - lse[:, None].float()).exp_().to(states.dtype) @ weight
    return total


def _head_slices(head: torch.nn.Linear, tokens: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    budget = CPU_BLOCK_BYTES // 2 if head.weight.device.type == "cpu" else DEVICE_BLOCK_BYTES
    step = max(1, budget // (4 * tokens))
    for start in range(0, len(head.weight), step):
        yield head.weight[start : start + step], None if head.bias is None else head.bias[start : start + step]


@dataclass
class ExactProfiler:
    """Measures the swaps of a job. `context` is the model that groups are swapped into."""

    job: ProfileJob
    reference: LayeredModel
    context: LayeredModel
    header: ProfileHeader
    plan: MemoryPlan
    batch: int = field(init=False)
    _parameters: dict[str, list[str]] = field(default_factory=dict)  # of every module asked about

    def __post_init__(self) -> None:
        self.ids, self.candidates = self.job.ids, self.job.by_label
        rows, most = len(self.ids), batch_rows(self.context.device, self.ids.shape[1])
        together = max(len(group.bits) for group in self.header.groups)
        if any(parameter.dim() == 3 for parameter in self.context.model.parameters()):
            together = 1  # routed experts: how many tokens of a batch an expert gets decides how its sums are rounded
        # whole candidates where they fit, so that the swaps of one group fill batches without padding
        self.batch = rows * min(most // rows, together) if rows <= most else most

    @torch.inference_mode()
    def run(self, journal: Journal, only: Set[tuple[str, str]] | None = None) -> Iterator[Measured]:
        """Measure what the journal lacks, appending as it goes. only: these (group, candidate) swaps."""
        total = sum(len(group.bits) for group in self.header.groups)
        if journal.profile.is_complete and journal.profile.control is not None:
            return
        self.tail = self._run_reference()
        states = self._rows(self.context.embed(self._padded_ids(), self.batch))
        if self.plan.resident_weights:
            for index in range(self.context.depth):
                self.context.load(self.context.layers[index], self.context.prefix_of_layer(index))
            self.context.load_head()
        self.context.load_norm()
        todo = set(journal.profile.missing())
        if only is not None:
            todo &= only
        if self.header.context == "base" and journal.profile.control is not None:
            todo = {swap for swap in todo if swap[1] != self.header.base}
        done = total - len(todo)
        early = [group for group in self.header.groups if group.layer is None and role_of(group.modules[0]) != "head"]
        for group in early:
            for found in self._measure_embedding(group, todo):
                journal.append([found])
                done += 1
                yield Measured(found, done, total)
        for index in range(self.context.depth):
            groups = [group for group in self.header.groups if group.layer == index]
            with self._layer(index):
                after = self._advance(index, states)
            for wave in self._waves(groups, todo):
                together = self._measure_wave(index, states, after, wave)
                journal.append(together)
                for measurement in together:
                    done += 1
                    yield Measured(measurement, done, total)
            states = after
        if journal.profile.control is None:
            control = Measurement(None, None, self._kl_rows(states))
            journal.append([control])
            yield Measured(control, done, total)
        for group in self.header.groups:
            if role_of(group.modules[0]) == "head":
                for found in self._measure_head(group, states, todo):
                    journal.append([found])
                    done += 1
                    yield Measured(found, done, total)

    # ---- states: [rows, tokens, hidden], always run in batches of one shape, so that equal rows give equal bits ----

    def _padded_ids(self) -> Tensor:
        """The rows, the first ones repeated until they fill whole batches."""
        rows = len(self.ids)
        wanted = -(-rows // self.batch) * self.batch
        return self.ids[torch.arange(wanted) % rows]

    def _rows(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(batches))[: len(self.ids)]

    def _advance(self, index: int, states: Tensor, model: LayeredModel | None = None) -> Tensor:
        """Run a loaded layer over any number of rows."""
        model = model or self.context
        rows = len(states)
        out = torch.empty_like(states)
        for start in range(0, rows, self.batch):
            piece = states[start : start + self.batch]
            short = self.batch - len(piece)
            if short:
                piece = torch.cat([piece, states[:1].expand(short, -1, -1)])
            out[start : start + self.batch] = model.run_layer(index, piece, start)[: self.batch - short]
        return out

    @contextmanager
    def _telling(self, wave: Sequence[tuple[ProfileGroup, str]]) -> Iterator[None]:
        """Inside, an error about a state names the swap that it is of: rows of several swaps run together."""
        try:
            yield
            self.context.watch.settle()
        except NotFiniteError as error:
            if error.row is None or not wave:
                raise
            swap, row = divmod(error.row % (len(wave) * len(self.ids)), len(self.ids))
            group, source = wave[swap]
            raise NotFiniteError(f"{error.where} with {group.name} from {source}", error.what, row) from error

    def _run_reference(self) -> ReferenceTail:
        model = self.reference
        states = self._rows(model.embed(self._padded_ids(), self.batch))
        for index in range(model.depth):
            with model.layer(index):
                states = self._advance(index, states, model)
        with model.norm_loaded() as norm, model.head_loaded() as head:
            # row by row, and by the head in the shapes that _kl_rows uses, so that equal states give equal bits
            normed = torch.cat([norm(state[None]) for state in states])
            model.watch.see(normed, model.loaded_from, "the final norm", 0, model.norm_module)
            tail = ReferenceTail(normed)
            if model.head_is_linear(normed[:1, :2]):
                assert isinstance(head, torch.nn.Linear), "as a linear head is"
                lse = torch.cat([log_sum_exp(head, some) for some in self._head_batches(normed)])
                projected = [_mean_head_row(head, row, sums) for row, sums in zip(normed, lse, strict=True)]
                tail = ReferenceTail(normed, lse, torch.stack(projected))
                check_finite(lse, f"{model.loaded_from}: logits of the reference")
        return tail

    # ---- measuring -------------------------------------------------------------------------------------------------

    def _waves(
        self, groups: Sequence[ProfileGroup], todo: set[tuple[str, str]]
    ) -> Iterator[list[tuple[ProfileGroup, str]]]:
        """Swaps that run together: the candidates of one group, or of several where layers must be read again."""
        wave: list[tuple[ProfileGroup, str]] = []
        for group in groups:
            wanted = [(group, source) for source in group.bits if (group.name, source) in todo]
            if wave and (self.plan.resident_weights or len(wave) + len(wanted) > self.plan.swaps_per_wave):
                yield wave
                wave = []
            wave += wanted
        if wave:
            yield wave

    def _measure_wave(
        self, index: int, states: Tensor, after: Tensor, wave: Sequence[tuple[ProfileGroup, str]]
    ) -> list[Measurement]:
        """Swaps of one layer; `after`: what leaves the layer with nothing swapped."""
        swapped, reached = [], []
        with self._layer(index) as layer:
            prefix = self.context.prefix_of_layer(index)
            for group, source in wave:
                mixed = SwappedSource(self.context.source, group.modules, self.candidates[source])
                with (
                    self._swapped(layer, prefix, group.modules, mixed) as differs,
                    self._quantized_inputs(index, group, source),
                    self._telling([(group, source)]),
                ):
                    swapped.append(self._advance(index, states))
                # experts alone: elsewhere a swap without effect is a finding, here it only says that none was asked
                experts = all(is_expert(module) for module in group.modules)
                reached.append(not (experts and differs and self._are_equal(swapped[-1], after)))
        together = torch.cat(swapped)
        del swapped
        for later in range(index + 1, self.context.depth):
            with self._telling(wave), self._layer(later) as layer:
                prefix = self.context.prefix_of_layer(later)
                if not any(self._names_in(prefix, group.modules) for group, _ in wave):
                    together = self._advance(later, together)
                    continue
                pieces = []  # weights that this layer shares with the one they are counted in
                for (group, source), states in zip(wave, together.split(len(self.ids)), strict=True):
                    mixed = SwappedSource(self.context.source, group.modules, self.candidates[source])
                    with self._swapped(layer, prefix, group.modules, mixed):
                        pieces.append(self._advance(later, states))
                together = torch.cat(pieces)
        rows = len(self.ids)
        return [
            Measurement(group.name, source, self._kl_rows(together[n * rows : (n + 1) * rows]), reached[n])
            for n, (group, source) in enumerate(wave)
        ]

    def _are_equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether states are equal up to the last place of each row that counts: what follows is seen by none."""
        if self.job.counted is None:
            return torch.equal(one, other)
        seen = self.job.counted.flip(1).cummax(1).values.flip(1).to(one.device)
        return torch.equal(one[seen], other[seen])

    def _quantized_inputs(self, index: int, group: ProfileGroup, source: str) -> AbstractContextManager[Any]:
        candidate = self.candidates[source]
        if not self.job.options.activations or isinstance(candidate, MadeVariant):
            return nullcontext()
        return QuantizedInputs(self.context, build_overlay(candidate, None), index, group.modules)

    @contextmanager
    def _swapped(
        self, layer: torch.nn.Module, prefix: str, modules: Sequence[str], mixed: WeightSource
    ) -> Iterator[bool]:
        """A loaded layer with `modules` from another source inside the block; yields whether that changes them."""
        places = [self.context.expert_of(module) for module in modules]
        if len(modules) < FEW_EXPERTS and all(place is not None for place in places):
            # slices of fused parameters: the other experts need not be read again
            slices = {place for place in places if place is not None}
            before = {}
            for name, expert in sorted(slices):
                memory = layer.get_parameter(name.removeprefix(f"{prefix}.")).data[expert]
                before[name, expert] = memory, memory.clone()
                memory.copy_(self.context.load_expert(name, expert, mixed))
            try:
                yield any(not torch.equal(memory, value) for memory, value in before.values())
            finally:
                for memory, value in before.values():
                    memory.copy_(value)
            return
        names = self._names_in(prefix, modules)
        kept = {name: layer.get_parameter(name.removeprefix(f"{prefix}.")) for name in names}
        for name in names:
            value = self.context.load_parameter(name, mixed)
            self.context.set_parameter(layer, name.removeprefix(f"{prefix}."), value)
        try:
            yield any(
                not torch.equal(layer.get_parameter(name.removeprefix(f"{prefix}.")), value)
                for name, value in kept.items()
            )
        finally:
            for name, kept_value in kept.items():
                self.context.set_parameter(layer, name.removeprefix(f"{prefix}."), kept_value.data)

    def _names_in(self, prefix: str, modules: Sequence[str]) -> list[str]:
        """The parameters of the layer at `prefix` that some modules take part in."""
        names = {name for module in modules for name in self._parameters_of(module)}
        return sorted(name for name in names if name.startswith(f"{prefix}."))

    def _parameters_of(self, module: str) -> list[str]:
        if module not in self._parameters:
            self._parameters[module] = self.context.parameters_of(module)
        return self._parameters[module]

    def _measure_embedding(self, group: ProfileGroup, todo: set[tuple[str, str]]) -> Iterator[Measurement]:
        for source in group.bits:
            if (group.name, source) in todo:
                mixed = SwappedSource(self.context.source, group.modules, self.candidates[source])
                with self._telling([(group, source)]):
                    states = self._rows(self.context.embed(self._padded_ids(), self.batch, mixed))
                    for index in range(self.context.depth):
                        with self._layer(index):
                            states = self._advance(index, states)
                if not self.context.is_head(group.modules[0]):
                    yield Measurement(group.name, source, self._kl_rows(states))
                    continue
                head = self.context.load_parameter(f"{self.context.prefix_of(self.context.head)}.weight", mixed)
                yield Measurement(group.name, source, self._kl_rows_plain(states, head))

    def _measure_head(self, group: ProfileGroup, states: Tensor, todo: set[tuple[str, str]]) -> Iterator[Measurement]:
        (module,) = group.modules
        for source in group.bits:
            if (group.name, source) in todo:
                weight = self.candidates[source].load(f"{module}.weight", device=self.context.device)
                shape = self.context.head.weight.shape
                weight = weight[: shape[0], : shape[1]].to(self.context.dtype)
                yield Measurement(group.name, source, self._kl_rows_plain(states, weight))

    def _kl_rows(self, states: Tensor) -> tuple[float, ...]:
        """Mean KL of every row, from the state after the last layer."""
        tail = self.tail
        if tail.lse is None or tail.projected is None:
            return self._kl_rows_plain(states, None)
        result = []
        with self._head() as head:
            assert isinstance(head, torch.nn.Linear), "as the reference's is"
            for wanted, wanted_lse, projected, found in zip(
                *map(self._head_batches, (tail.normed, tail.lse, tail.projected, states)), strict=True
            ):
                normed = torch.cat([self.context.norm(state[None]) for state in found])
                moved = torch.linalg.vecdot(projected.float(), (normed - wanted).float()).double()
                result.append(log_sum_exp(head, normed) - wanted_lse - moved)
        return tuple(row_means(torch.cat(result), self.job.counted).tolist())

    @staticmethod
    def _head_batches(rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of about HEAD_TOKENS tokens together; [rows, tokens, ...] each."""
        return rows.split(max(1, HEAD_TOKENS // rows.shape[1]))

    def _kl_rows_plain(self, states: Tensor, head_weight: Tensor | None) -> tuple[float, ...]:
        """The same through both models' logits; `head_weight` takes the place of the context's head."""
        result = []
        with self._reference_head(), self._head() as head:
            kept = head.weight.data
            for row, state in enumerate(states):
                places = places_of(self.job.counted, row)
                normed = pick(self.context.norm(state[None])[0], places)
                of_reference = pick(self.tail.normed[row], places)[None]
                total = 0.0
                for start in range(0, len(normed), LOGIT_CHUNK_TOKENS):
                    piece = slice(start, start + LOGIT_CHUNK_TOKENS)
                    wanted = self.reference.logits(of_reference[:, piece])
                    # only now: in the clean context both are one model
                    self.context.set_parameter(head, "weight", kept if head_weight is None else head_weight)
                    found = self.context.logits(normed[None, piece])
                    self.context.set_parameter(head, "weight", kept)
                    total += float(kl_divergence(wanted, found).double().sum())
                result.append(total / len(normed))
        return tuple(result)

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _layer(self, index: int) -> Any:
        if self.plan.resident_weights:
            return _Resident(self.context.layers[index])
        return self.context.layer(index)

    def _head(self) -> Any:
        return _Resident(self.context.head) if self.plan.resident_weights else self.context.head_loaded()

    def _reference_head(self) -> Any:
        return self._head() if self.reference is self.context else self.reference.head_loaded()


class _Resident:
    """A module that stays loaded, with the interface of `LayeredModel.loaded`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> torch.nn.Module:
        return self.module

    def __exit__(self, *_: object) -> None:
        return


def check_activations(options: ProfileOptions, candidates: Sequence[tuple[SourceId, Checkpoint]]) -> None:
    """Raise RecompileError where swaps cannot be run with quantized inputs, or no candidate quantizes any."""
    if options.context != "clean":
        raise RecompileError("{activations} measures one group's inputs at a time: it needs {context} clean")
    if options.head or options.embedding:
        raise RecompileError(
            "{activations}: inputs of the head are never quantized here; leave out {head}, {embedding}"
        )
    if not any(
        quantizes_inputs(build_overlay(found, None)) for _, found in candidates if not isinstance(found, MadeVariant)
    ):
        raise RecompileError(
            f"{{activations}}: none of {', '.join(found.label for _, found in candidates)} says how inputs are "
            f"quantized "
            f"(input_activations in its config groups); leave it out"
        )


def profile_exact(job: ProfileJob) -> Iterator[Started | Measured | Profile]:
    """Measure every (group, candidate) swap; yields Started, a Measured per swap, and last the Profile.

    An interrupted run goes on from the job's journal.
    Raises JournalError, MismatchError, MissingWeight, RecompileError (a memory cap that cannot be kept).
    """
    options, model = job.options, job.model()
    header = job.header(model.dtype, settings={"activations": True} if options.activations else None)
    if options.activations:
        check_activations(options, job.candidates)
        model.model.set_experts_implementation("eager")  # one linear call an expert, which QuantizedInputs sees
    context = job.context(model)
    plan = job.plan(model, header)
    with open_journal(job.path, header) as journal:
        total = sum(len(group.bits) for group in header.groups)
        yield Started(plan, total, total - len(journal.profile.missing()))
        yield from ExactProfiler(job, model, context, header, plan).run(journal)
        profile = journal.profile
    if options.context == "clean" and profile.control is not None and any(v != 0.0 for v in profile.control.kl_rows):
        worst = max(abs(v) for v in profile.control.kl_rows)
        raise RecompileError(
            f"{job.path}: the control (nothing swapped) has KL {worst:.3g} instead of 0: this device's arithmetic is "
            f"not repeatable, and small swaps cannot be told from noise"
        )
    yield profile
