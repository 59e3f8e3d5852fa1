"""base model -> variants at several bitrates, in one pass over the layers.

A layer is loaded once; running the calibration rows through it collects the Hessian of every input; the layer is then
quantized to all bitrates from them and written out, and the rows go on through the unquantized layer. Memory is bounded
by one layer, its Hessians and the rows' hidden states.

An encoder may also ask for scales that move from a map's inputs into what makes them (AWQ, SmoothQuant;
smoothing_mappings.py). They are folded exactly: a norm is stored rounded, and what its consumers are multiplied by is
taken from the rounded value; where a tensor that stays unquantized changes, scales are powers of two.

Every variant grows in `<name>.building`, a file a layer, and gets its name when whole. A run that was killed goes on
after the last layer that all variants hold.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, MlxCheckpoint, StoredModule, open_checkpoint, read_json
from recompile.checkpoint.coupled_modules import SCALING_NAME, ScaledSet, dump_scaled_sets, read_scaled_sets
from recompile.checkpoint.module_names import ROLES_NAME, Dense, Role, dump_roles, head_in, role_of
from recompile.checkpoint.safetensors_files import open_tensors, read_tensor
from recompile.costs import fused_sets
from recompile.errors import FormatError, OutputError
from recompile.formats.compressed_tensors import named_for_loaders
from recompile.io.checksums import read_checked_json, run_of, write_checked_json
from recompile.io.files import (
    check_partial,
    finished_meanwhile,
    is_marked,
    locked,
    remove_empty,
    remove_partial,
    settle,
    unmarked,
    write_json,
    write_text,
)
from recompile.io.journal import settings_difference
from recompile.io.schema import read_as
from recompile.io.tensors import save_tensors
from recompile.merge.configs import is_linear
from recompile.merge.left_dense import left_dense
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import other_files, plan_write
from recompile.merge.write_safetensors import execute
from recompile.model.decoded import NOWHERE, as_dense
from recompile.model.roles import roles_of
from recompile.model.skeleton import module_of
from recompile.model.stream import LayeredModel
from recompile.model.tokenizer import tokenizer_texts
from recompile.model.used_rows import UsedRows
from recompile.quantize.calibrate import InputCollector, InputStatistics, run_batches
from recompile.quantize.compensated import ComparedPass, RoundedLayer
from recompile.quantize.encoder import Encoded, Encoder, KeyedEncoder, ObservingEncoder, ScalingEncoder
from recompile.quantize.kept_states import KeptStates, stage_report, stage_sets, stage_shard
from recompile.quantize.module_error import measure, output_power
from recompile.quantize.quantize_report import (
    REPORT,
    LayerDone,
    ModuleReport,
    QuantizeReport,
    VariantReport,
    read_report,
    variant_report,
)
from recompile.quantize.smoothing_mappings import Fold, find_folds
from recompile.quantize.smoothing_scales import powers_of_two, scaled_statistics

T = TypeVar("T")
JOURNAL = ".quantize_journal.json"  # hidden files stay behind when the variant is made whole
BUILDING_SUFFIX = ".building"
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class BuildOptions:
    """How variants are made; encoder and rows are arguments of their own.

    head:        also quantize the output head
    rows_sha256: of the rows, for the journal; used: which rows they are, for the report
    counted:     bool [rows, tokens], the places of the rows whose inputs count; None: all
    sequential:  calibrate every layer on what the quantized layers before it give, in place of the base's activations;
                 for one variant; the modules fit that variant better than a merge
    compensate:  as sequential, and every module aims at the base's outputs, see compensated.py
    dense:       what stays dense beside what its role keeps so (routers, gates, norms, convolutions, embeddings,
                 towers)
    """

    head: bool = False
    device: str = "cpu"
    dtype: torch.dtype | None = None
    rows_sha256: str = ""
    shard_mb: int = 8192
    sequential: bool = False
    compensate: bool = False
    dense: Dense = field(default_factory=Dense)
    counted: Tensor | None = field(default=None, compare=False)
    used: UsedRows | None = None

    @property
    def on_itself(self) -> bool:
        """Whether layers are calibrated on what the quantized layers before them give."""
        return self.sequential or self.compensate


@dataclass
class _Scales:
    """What scaling does to one layer of one variant. Rows and columns are of weights, float32."""

    columns: dict[str, Tensor] = field(default_factory=dict)  # module -> [in], multiplies
    rows: dict[str, Tensor] = field(default_factory=dict)  # module -> [out], divides
    norms: dict[str, tuple[Tensor, float]] = field(default_factory=dict)  # module -> ([channels], offset), divides
    sets: list[ScaledSet] = field(default_factory=list)

    def weight(self, name: str, value: Tensor) -> Tensor:
        """[out, in] float32."""
        value = value * self.columns[name] if name in self.columns else value
        return value / self.rows[name][:, None] if name in self.rows else value

    def bias(self, name: str, value: Tensor) -> Tensor:
        return (value.float() / self.rows[name].to(value.device)).to(value.dtype) if name in self.rows else value

    def touches(self, names: Sequence[str]) -> bool:
        return any(name in self.columns or name in self.rows for name in names)


def quantize_model(
    base: Checkpoint,
    out_dir: Path,
    encoder: Encoder,
    ids: Tensor,
    options: BuildOptions | None = None,
) -> Iterator[LayerDone | QuantizeReport]:
    """Quantize `base` to every variant of `encoder`; yields a LayerDone per layer and last the QuantizeReport.

    ids: int64 [rows, tokens] calibration rows

    MTP layers are quantized with the inputs of the last layer's modules of the same kind, or without where none fit.
    Variants that the same run finished before are kept. Raises OutputError if a directory belongs to another run.
    """
    options = options or BuildOptions()
    if options.on_itself and len(encoder.names) != 1:
        raise FormatError(f"{len(encoder.names)} variants: one at a time can be calibrated on its own activations")
    if options.compensate and isinstance(encoder, ScalingEncoder) and encoder.scales_inputs:
        raise FormatError("methods that scale inputs before they round (AWQ, SmoothQuant) do not compensate")
    base = as_dense(base)
    roles = roles_of(base)
    linear = [m for m in base.modules.values() if options.dense.why_dense(m.name, roles[m.name], m.shape) is None]
    reasons = {
        m.name: encoder.why_not(m.name, (m.shape[0], m.shape[1])) for m in linear if m.shape and len(m.shape) == 2
    }
    if reasons and all(reasons.values()):
        name = next(iter(reasons))
        raise FormatError(f"{base.label}: nothing would be quantized; {name}: {reasons[name]}")
    yield from _Build(base, out_dir, encoder, ids, options).run()


class _Build:
    def __init__(self, base: Checkpoint, out_dir: Path, encoder: Encoder, ids: Tensor, options: BuildOptions) -> None:
        self.options, self.roles = options, roles_of(base)
        self.decoded: dict[str, Tensor] = {}  # of the layer just quantized, where later ones are calibrated on it
        self.base, self.encoder, self.ids = base, encoder, ids
        self.compared: ComparedPass | None = None  # where modules aim at the base's outputs
        self.model = LayeredModel.of(base, dtype=options.dtype, device=options.device)
        self.model.model.set_experts_implementation("eager")  # one linear call an expert, which InputCollector sees
        self.finals = [out_dir / name for name in encoder.names]
        self.partials = [final.with_name(final.name + BUILDING_SUFFIX) for final in self.finals]
        self.journal = {
            "base": base.identity,
            "rows": options.rows_sha256,
            "row_shape": list(ids.shape),
            "head": options.head,
            "dtype": str(self.model.dtype),
            "encoder": encoder.description(),
            **({"sequential": True} if options.sequential else {}),
            **({"compensate": True} if options.compensate else {}),
            "dense": {
                **asdict(options.dense),
                "keep": list(options.dense.keep),
                "quantize": list(options.dense.quantize),
            },
        }
        self.kept_states = KeptStates(self.partials[0], run_of(self.journal))  # where layers are calibrated on it
        self.reports: list[dict[str, ModuleReport]] = [{} for _ in self.finals]
        self.begun: list[Path] = []  # partials that this run made
        self._held = ExitStack()  # locks on the partials, while `run` runs
        self.first_layer: dict[str, int] = {}  # of a module; weights that layers share are rounded in their first one
        for n in range(self.model.depth):
            for name in self.model.modules_of_layer(n):
                self.first_layer.setdefault(name, n)
        self.in_layers = set(self.first_layer)
        self.shared = {
            name
            for n in range(self.model.depth)
            for name in self.model.modules_of_layer(n)
            if self.first_layer[name] != n
        }
        self.outside = [name for name in base.modules if name not in self.in_layers and self._is_made_outside(name)]
        self.turned = {name for name in self.in_layers if self.model.is_turned(name)}  # stored as [in, out]
        likes = {like for name in self.outside if (like := self.roles[name].like) is not None}
        self.kept: dict[str, InputStatistics] = {}  # of modules whose inputs stand in for those of MTP layers
        self.likes = {
            n: found for n in range(self.model.depth) if (found := likes & set(self.model.modules_of_layer(n)))
        }
        self.stages = [
            *map(self.model.prefix_of_layer, range(self.model.depth)),
            *(["outside the layers"] if self.outside else []),
            *(["head"] if options.head else []),
        ]

    def run(self) -> Iterator[LayerDone | QuantizeReport]:
        with self._held:
            try:
                yield from self._run()
            except Exception:
                for partial in self.begun:  # a run that failed before anything was done leaves nothing in the way
                    if partial.is_dir() and not self._stages_done(partial):
                        remove_partial(partial, JOURNAL)
                raise

    @torch.inference_mode()
    def _run(self) -> Iterator[LayerDone | QuantizeReport]:
        first = self._open_outputs()
        if first == len(self.stages):  # killed while the variants were put together
            for number in range(first):
                yield self._resumed(number)
            yield self._finish()
            return
        batch = max(1, BATCH_TOKENS // self.ids.shape[1])
        states = list(self.model.embed(self.ids, batch))
        if self.options.compensate:
            self.compared = ComparedPass(self.base, self.model, self.ids, batch, self.options.counted)
        if self.options.on_itself and first:
            self.decoded = self.kept_states.take_up(self._all_states(states))
        for number in range(self.model.depth):
            if self.options.on_itself and number < first:
                yield self._resumed(number)
                continue
            names = [name for name in self.model.modules_of_layer(number) if self.first_layer[name] == number]
            if self.compared is not None:
                done = self._quantize(number, names, self._compared_groups(number, states))
                self.compared.advance(number, states, RoundedLayer(self.base, self.decoded))
            else:
                with self.model.layer(number):
                    if number < first:
                        self._advance_again(number, states)
                        yield self._resumed(number)
                        continue
                    row = states[0][:1].clone()
                    with InputCollector(self.model, number) as collector:
                        self._collect(number, list(states) if self.options.on_itself else states, collector)
                    folds = self._folds(number, row) if self._scales_inputs else []
                    self._keep(number, collector.groups)
                    groups = [self._of_layer(number, group) for group in collector.groups]
                    done = self._quantize(number, names, groups, folds)
            if self.options.on_itself:
                if self.compared is None:
                    with self.model.layer(number, RoundedLayer(self.base, self.decoded)):
                        self._advance(number, states)
                self.decoded = {k: v for k, v in self.decoded.items() if k.rpartition(".")[0] in self.shared}
                self._keep_states(number, states)
            yield done
        if self.outside:
            at = self.model.depth
            yield self._resumed(at) if at < first else self._quantize(at, self.outside, self._borrowed(states))
            self.kept = {}
        if self.options.head:
            yield self._quantize_head(states)
        yield self._finish()

    def _all_states(self, states: list[Tensor]) -> dict[str, list[Tensor]]:
        return {"state": states} | ({"base": self.compared.wanted} if self.compared is not None else {})

    def _keep_states(self, number: int, states: list[Tensor]) -> None:
        """For a run that goes on after this one was killed; not what MTP layers want of a layer, which is run again."""
        last = number == self.model.depth - 1
        if not any(layer <= number for layer in self.likes) and (last or self.kept_states.is_due()):
            self.kept_states.keep(number, self._all_states(states), self.decoded)

    def _compared_groups(self, number: int, states: list[Tensor]) -> Iterator[InputStatistics]:
        """What the modules of a layer are given, each asked for when those called before it are rounded."""
        assert self.compared is not None
        for group in self.compared.groups(number, states, lambda: RoundedLayer(self.base, self.decoded)):
            self._keep(number, [group])
            yield self._of_layer(number, group)

    def _of_layer(self, number: int, group: InputStatistics) -> InputStatistics:
        """A group without the modules that an earlier layer shares with this one, which are rounded already."""
        left = [name for name in group.modules if self.first_layer.get(name, number) == number]
        return group if len(left) == len(group.modules) else replace(group, modules=left)

    def _advance_again(self, number: int, states: list[Tensor]) -> None:
        """Run a layer that is quantized already, once more collecting what MTP layers want of it."""
        if number not in self.likes:
            self._advance(number, states)
            return
        with InputCollector(self.model, number) as collector:
            self._collect(number, states, collector)
        self._keep(number, collector.groups)

    def _keep(self, number: int, groups: Sequence[InputStatistics]) -> None:
        for group in groups if number in self.likes else ():
            self.kept |= dict.fromkeys(self.likes[number] & set(group.modules), group)

    def _borrowed(self, states: Sequence[Tensor]) -> list[InputStatistics]:
        """The inputs' statistics of modules outside the layers: those of modules like them, where there are any, and of
        the head for an embedding that is the head as well; states: after the last layer."""
        borrowed = []
        embeds = any(role_of(name) == "embedding" for name in self.outside)
        tied = self._weight_tensor(self._head_module()).removesuffix(".weight") if embeds else None
        for members in fused_sets(name for name in self.outside if self._is_linear(name)):
            if tied in members:
                note = f"made with the inputs of {self._head_module()}, which it is as well"
                borrowed += [self._head_statistics(states, name, note) for name in members]
                continue
            like = self.roles[members[0]].like
            found = self.kept.get(like) if like is not None else None
            if found is None or found.hessian is None:
                borrowed.append(InputStatistics(list(members), note="not calibrated: made without a Hessian"))
            else:
                borrowed.append(replace(found, modules=list(members), note=f"made with the inputs of {like}"))
        return borrowed

    def _is_made_outside(self, name: str) -> bool:
        """Whether a module is quantized though no layer of the pass holds it: an MTP layer's, one between layers."""
        if role_of(name) == "head" or name == self._head_module() or not self._is_linear(name):
            return False
        return self.options.dense.why_dense(name, self.roles[name], self.base.modules[name].shape) is None

    def _collect(self, index: int, states: list[Tensor], collector: InputCollector) -> None:
        run_batches(self.model, index, states, len(states[0]), collector, self.options.counted)

    def _advance(self, index: int, states: list[Tensor]) -> None:
        for n, state in enumerate(states):
            states[n] = self.model.run_layer(index, state, n * len(states[0]))

    # ---- outputs and resuming --------------------------------------------------------------------------------------

    def _open_outputs(self) -> int:
        """Create or take up the partial directories; returns the number of stages that all of them hold."""
        for final in self.finals:
            if final.exists():
                made_by = read_json(final / REPORT).get("made_by") if (final / REPORT).exists() else None
                if made_by != self.journal:
                    why = f" with other settings ({settings_difference(made_by, self.journal)})" if made_by else ""
                    raise OutputError(f"{final}: exists already{why}; remove it, or choose another {{out}}")
                settle(final)
                remove_empty(final.with_name(final.name + BUILDING_SUFFIX))
        try:
            done = [len(self.stages)]
            for final, partial in zip(self.finals, self.partials, strict=True):
                check_partial(partial, JOURNAL)
                if final.exists():
                    continue
                journal = partial / JOURNAL
                if not is_marked(partial, JOURNAL):
                    with unmarked(partial):
                        partial.mkdir(exist_ok=True)
                        self._held.enter_context(locked(partial, final))
                        if final.exists():  # another run renamed it since it was looked for
                            raise OutputError(finished_meanwhile(final))
                        write_json(journal, self.journal)
                        self.begun.append(partial)
                elif (begun := self._read_journal(journal)) != self.journal:
                    changed = settings_difference(begun, self.journal)
                    raise OutputError(
                        f"{partial}: was begun with other settings ({changed}); remove it, or run with those settings "
                        f"to go on"
                    )
                else:
                    self._held.enter_context(locked(partial, final))
                done.append(self._stages_done(partial))
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be written: {error.strerror or error}") from error
        first = min(done)
        if self.options.on_itself and first < len(self.stages):
            after = self.kept_states.after()  # what the layers before gave
            first = 0 if after >= first else first if after == self.model.depth - 1 else after + 1
        for report, final, partial in zip(self.reports, self.finals, self.partials, strict=True):
            again = f"remove {partial} to start again"
            for number in range(0 if final.exists() else first):
                shard, run = partial / stage_shard(number), run_of(self.journal)
                with open_tensors(shard, error=OutputError, way_out=f"; {again}", checks=True, run=run):
                    pass  # it is whole, and as it was written
                self._read_list(partial, stage_sets(number), "sets", ScaledSet)
                for entry in self._read_list(partial, stage_report(number), "modules", ModuleReport):
                    report[entry.module] = entry
        return first

    @staticmethod
    def _read_journal(path: Path) -> Any:
        return read_checked_json(path, error=OutputError, way_out=f"remove {path.parent} to start again")

    def _stages_done(self, partial: Path) -> int:
        number = 0
        while number < len(self.stages) and (partial / stage_report(number)).exists():
            number += 1
        return number

    def _read_list(self, partial: Path, file: str, key: str, kind: type[T]) -> list[T]:
        """What a stage left. Raises OutputError where it was damaged since, or is of another run."""
        place, way_out = partial / file, f"remove {partial} to start again"
        found = read_checked_json(place, error=OutputError, way_out=way_out)
        listed = found.get(key) if isinstance(found, dict) else None
        if not isinstance(listed, list) or found.get("run") != run_of(self.journal):
            raise OutputError(f"{place}: is not what this run left there, or another run's; {way_out}")
        try:
            return [read_as(kind, one, f"{place}: {key}[{n}]", error=OutputError) for n, one in enumerate(listed)]
        except OutputError as error:
            raise OutputError(f"{error}; {way_out}") from error

    def _resumed(self, number: int) -> LayerDone:
        return LayerDone(number, len(self.stages), self.stages[number], True, {})

    def _write_stage(
        self,
        number: int,
        variant: int,
        tensors: dict[str, Tensor],
        reports: list[ModuleReport],
        sets: Sequence[ScaledSet] = (),
    ) -> None:
        if self.finals[variant].exists():
            return
        partial = self.partials[variant]
        shard = partial / stage_shard(number)
        try:
            run = run_of(self.journal)
            save_tensors(shard, tensors, {"format": "pt"}, checked=True, run=run)
            for file, key, parts in ((stage_sets, "sets", sets), (stage_report, "modules", reports)):
                write_checked_json(partial / file(number), {"run": run, key: [asdict(part) for part in parts]})
        except (OSError, OutputError) as error:
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            free = shutil.disk_usage(partial).free
            raise OutputError(
                f"{shard}: cannot be written ({error}); it needs {needed} bytes, {free} are free; "
                f"make room and run the same command again, it goes on from here"
            ) from error

    # ---- one layer ------------------------------------------------------------------------------------------------

    @property
    def _scales_inputs(self) -> bool:
        return isinstance(self.encoder, ScalingEncoder) and self.encoder.scales_inputs

    def _quantize(
        self, number: int, names: Sequence[str], groups: Iterable[InputStatistics], folds: Sequence[Fold] = ()
    ) -> LayerDone:
        """groups: one is asked for when those before it are rounded; all at once where inputs are scaled (folds)."""
        variants = len(self.finals)
        groups = list(groups) if folds else groups
        scales = self._choose_scales(folds, groups if isinstance(groups, list) else [])
        scalable = {name for fold in folds for name in fold.consumers}
        scaling = [self._scales_in(variant) for variant in range(variants)]
        tensors: list[dict[str, Tensor]] = [{} for _ in range(variants)]
        reports: list[list[ModuleReport]] = [[] for _ in range(variants)]
        taken: set[str] = set()
        for group in self._with_unseen(names, groups):
            weights: dict[str, Tensor] = {}
            biases: dict[str, Tensor] = {}
            for name in group.modules:
                why = self._why_dense(name)
                if why is not None:
                    for report in reports:
                        report.append(self._dense_report(name, why, group.tokens))
                    continue
                weight = self.base.load(self._weight_tensor(name), device=self.model.device).float()
                weights[name] = group.aimed(name, weight.T.contiguous() if name in self.turned else weight)
                if f"{name}.bias" in self.base.tensors:
                    biases[name] = self.base.load(f"{name}.bias", device=self.model.device)
            if not weights:
                continue
            plain = [variant for variant in range(variants) if not scales[variant].touches(list(weights))]
            found = self._encode(self._only(plain), weights, group, biases) if plain else []
            made_of = dict(zip(plain, found, strict=True))
            power = {name: output_power(weight, group.hessian) for name, weight in weights.items()}
            for variant in range(variants):
                if variant in made_of:
                    encoded, own, statistics, own_power = made_of[variant], weights, group, power
                else:
                    encoded, own, statistics = self._encode_scaled(variant, scales[variant], weights, group, biases)
                    own_power = {name: output_power(weight, statistics.hessian) for name, weight in own.items()}
                for name, weight in own.items():
                    if name not in encoded:  # dense in this variant only
                        tensors[variant].update(self._dense_tensors(self.base.modules[name], scales[variant]))
                        reports[variant].append(self._dense_report(name, self._why_not_in(variant, name), group.tokens))
                        continue
                    made = encoded[name]
                    if self.options.on_itself:
                        self.decoded[f"{name}.weight"] = (
                            made.dense.T.contiguous() if name in self.turned else made.dense
                        )
                    for part, value in made.parts.items():
                        tensors[variant][f"{name}.{part}"] = value.contiguous().cpu()
                    report_of_one = measure(name, weight, made, statistics, own_power[name])
                    smoothed = name in scalable if scaling[variant] else None
                    reports[variant].append(replace(report_of_one, smoothed=smoothed))
            taken.update(weights)
        untaken = [name for name in names if name not in taken]
        for variant in range(variants):
            tensors[variant].update(self._all_dense(untaken, scales[variant]))
        if self.options.on_itself and self.compared is None:  # which moves no scales of dense tensors
            self.decoded = tensors[0] | self.decoded
        for variant in range(variants):
            self._write_stage(number, variant, tensors[variant], reports[variant], scales[variant].sets)
            self.reports[variant].update({report.module: report for report in reports[variant]})
        by_variant = {name: tuple(r) for name, r in zip(self.encoder.names, reports, strict=True)}
        return LayerDone(number, len(self.stages), self.stages[number], False, by_variant)

    def _with_unseen(self, names: Sequence[str], groups: Iterable[InputStatistics]) -> Iterator[InputStatistics]:
        """The groups, then one without inputs for what no token reached."""
        seen: set[str] = set()
        for group in groups:
            seen.update(group.modules)
            yield group
        unseen = [name for name in names if self._is_linear(name) and name not in seen]
        yield from (InputStatistics(list(members)) for members in fused_sets(unseen))

    def _only(self, variants: Sequence[int]) -> Encoder:
        if not self._scales_inputs or len(variants) == len(self.finals):
            return self.encoder
        assert isinstance(self.encoder, ScalingEncoder)
        return self.encoder.only(variants)

    @staticmethod
    def _encode(
        encoder: Encoder, weights: Mapping[str, Tensor], group: InputStatistics, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        if isinstance(encoder, ObservingEncoder):
            return encoder.encode_observed(weights, group.hessian, biases, group.largest)
        return encoder.encode(weights, group.hessian, biases)

    # ---- scaling ---------------------------------------------------------------------------------------------------

    def _encode_scaled(
        self,
        variant: int,
        scales: _Scales,
        weights: Mapping[str, Tensor],
        group: InputStatistics,
        biases: Mapping[str, Tensor],
    ) -> tuple[dict[str, Encoded], dict[str, Tensor], InputStatistics]:
        """One variant's encoding of weights with their scales folded in, those weights, and their inputs' statistics.

        Modules that share an input share its scale.
        """
        own = {name: scales.weight(name, weight) for name, weight in weights.items()}
        columns = [scales.columns[name] for name in weights if name in scales.columns]
        statistics = scaled_statistics(group, columns[0]) if columns else group
        shifted = {name: scales.bias(name, bias) for name, bias in biases.items()}
        (encoded,) = self._encode(self._only([variant]), own, statistics, shifted)
        return encoded, own, statistics

    def _folds(self, number: int, row: Tensor) -> list[Fold]:
        """Those of a loaded layer, but for those that would change fused experts which stay in one dense tensor."""
        whole: set[str] = set()
        for modules, _ in self.base.fused_blocks:
            if all(self._why_dense(name) is not None for name in modules if self._is_linear(name)):
                whole |= modules
        found = find_folds(self.model, number, row)
        return [fold for fold in found if whole.isdisjoint((fold.producer, *fold.consumers))]

    def _scales_in(self, variant: int) -> bool:
        if not self._scales_inputs:
            return False
        only = self._only([variant])
        return isinstance(only, ScalingEncoder) and only.scales_inputs

    def _choose_scales(self, folds: Sequence[Fold], groups: Sequence[InputStatistics]) -> list[_Scales]:
        """The scales of a layer in every variant."""
        found = [_Scales() for _ in self.finals]
        statistics = {name: group for group in groups for name in group.modules}
        for fold in folds:
            assert isinstance(self.encoder, ScalingEncoder)
            seen = {name: statistics.get(name) or InputStatistics([name]) for name in fold.consumers}
            weights = {}
            for name in fold.consumers:
                weight = self.base.load(f"{name}.weight", device=self.model.device).float()
                weights[name] = weight.T.contiguous() if name in self.turned else weight
            for variant, scales in enumerate(found):
                scale = self.encoder.scale_of(variant, fold, weights, seen, self._storable(variant, fold))
                if scale is None or bool((scale == 1).all()):
                    continue
                for name in fold.consumers:
                    scales.columns[name] = scale[fold.channels]
                if fold.offset is None:
                    scales.rows[fold.producer] = scale
                else:
                    scales.norms[fold.producer] = (scale, fold.offset)
                scales.sets.append(ScaledSet(fold.producer, fold.consumers))
        return found

    def _storable(self, variant: int, fold: Fold) -> Callable[[Tensor], Tensor]:
        """What turns a scale into the nearest one that leaves the function the same to float32's last bits."""
        unquantized = [name for name in fold.consumers if self._is_dense_in(variant, name)]
        has_bias = f"{fold.producer}.bias" in self.base.tensors
        if fold.offset and (unquantized or has_bias):  # no power of two survives the rounding of weight - offset
            return torch.ones_like
        if unquantized or has_bias or (fold.offset is None and self._is_dense_in(variant, fold.producer)):
            return powers_of_two
        if fold.offset is None:
            return lambda scale: scale
        weight = self.base.load(f"{fold.producer}.weight", device=self.model.device)
        dtype, offset = self.encoder.dense_dtype(weight.dtype), fold.offset

        def take_back(scale: Tensor) -> Tensor:
            factor = weight.double() + offset
            stored = (factor / scale - offset).to(dtype).double() + offset
            usable = (factor != 0) & (stored != 0) & stored.isfinite()
            return torch.where(usable, factor / stored, torch.ones_like(factor)).float()

        return take_back

    def _is_dense_in(self, variant: int, name: str) -> bool:
        if self._why_dense(name) is not None:
            return True
        shape = self._shape(name)
        return isinstance(self.encoder, ObservingEncoder) and (
            self.encoder.why_not_in(variant, name, (shape[0], shape[1])) is not None
        )

    def _why_not_in(self, variant: int, name: str) -> str:
        assert isinstance(self.encoder, ObservingEncoder), "other encoders make every module in every variant"
        shape = self._shape(name)
        why = self.encoder.why_not_in(variant, name, (shape[0], shape[1]))
        assert why is not None, f"{name}: left out without a reason"
        return why

    def _quantize_head(self, states: list[Tensor]) -> LayerDone:
        statistics = self._head_statistics(states, self._head_module())
        return self._quantize(len(self.stages) - 1, [], [statistics])

    def _head_statistics(self, states: Sequence[Tensor], module: str, note: str = "") -> InputStatistics:
        """Of the head's inputs, as those of a module."""
        if self.compared is not None:
            return self.compared.of_head(states, module, note)
        statistics = InputStatistics([module], note=note)
        with self.model.norm_loaded() as norm:
            for n, state in enumerate(states):
                normed, first = norm(state), n * len(states[0])
                if self.options.counted is not None:
                    normed = normed[self.options.counted[first : first + len(state)].to(normed.device)]
                statistics.add(normed)
        return statistics

    def _weight_tensor(self, name: str) -> str:
        """The tensor that holds a module's weight: a tied head's is the embedding's."""
        tensor = f"{name}.weight"
        return tensor if tensor in self.base.tensors else self.model.origins[tensor].tensors[0]

    def _head_module(self) -> str:
        own = self.model.prefix_of(self.model.head)
        return own if own in self.base.modules else head_in(self.base.modules) or own

    def _is_linear(self, name: str) -> bool:
        shape = self.base.modules[name].shape
        return shape is not None and len(shape) == 2

    def _why_dense(self, name: str) -> str | None:
        shape = self._shape(name)
        role = self.roles.get(name, Role("text", "head", name))  # a tied head is stored nowhere
        if role.kind != "head":  # asked for as a whole
            why = self.options.dense.why_dense(name, role, shape)
            if why is not None:
                return f"{why}, kept dense"
        return self.encoder.why_not(name, (shape[0], shape[1]))

    def _shape(self, name: str) -> tuple[int, ...]:
        stored = self.base.modules.get(name)
        if stored is None or stored.shape is None:  # a tied head has no tensors of its own
            return (self.model.vocab_size, self.model.hidden_size)
        return stored.shape[::-1] if name in self.turned else stored.shape

    def _dense_report(self, name: str, why: str, tokens: int) -> ModuleReport:
        module = self.base.modules.get(name)  # None for a tied head, which takes no room of its own
        stored = self._dense_tensors(module).values() if module is not None else ()
        size = sum(value.numel() * value.element_size() for value in stored)
        return ModuleReport(name, math.prod(self._shape(name)), size, 0.0, None, 0.0, tokens, False, why)

    def _all_dense(self, names: Sequence[str], scales: _Scales | None = None) -> dict[str, Tensor]:
        """Modules as they are; fused experts of which none is quantized in the tensors that the base has them in."""
        left = dict.fromkeys(names)
        tensors: dict[str, Tensor] = {}
        for modules, stored in self.base.fused_blocks:
            if modules <= left.keys():
                left = {name: None for name in left if name not in modules}
                for name in stored:
                    module = self.base.whole.modules[module_of(self.base.whole, name)]
                    tensors |= self._dense_tensors(module, role=self.roles[next(iter(modules))])
        for name in left:
            tensors |= self._dense_tensors(self.base.modules[name], scales)
        return tensors

    def _dense_tensors(
        self, module: StoredModule, scales: _Scales | None = None, role: Role | None = None
    ) -> dict[str, Tensor]:
        tensors = {}
        role = role or self.roles[module.name]
        mtp_kept = self.options.dense.mtp == "keep"
        carried = role.part in ("tower", "unused") or (role.part == "mtp" and mtp_kept)  # byte for byte
        for part, info in module.parts.items():
            raw = info.offset != NOWHERE and not isinstance(self.base, MlxCheckpoint)
            value = read_tensor(info) if raw else self.base.read(info.name)
            if value.is_floating_point() and not carried:
                wanted = self.encoder.dense_dtype(value.dtype)
                if scales is not None:
                    turned = module.name in self.turned and part == "weight"
                    value = _scaled_value(module.name, part, value.T if turned else value, scales)
                    value = value.T.contiguous() if turned else value
                cast = value.to(wanted)
                if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(value).all()):
                    raise FormatError(
                        f"{info.name}: has values up to {float(value.abs().max())}, too large for {wanted}"
                    )
                value = cast
            tensors[info.name] = value
        return tensors

    # ---- the end --------------------------------------------------------------------------------------------------

    def _finish(self) -> QuantizeReport:
        finished = [self._finish_variant(variant) for variant in range(len(self.finals))]
        return QuantizeReport(tuple(finished), tuple(str(final) for final in self.finals))

    def _finish_variant(self, variant: int) -> VariantReport:
        """Write what is outside the layers, then the final directory from the stage files, and remove those."""
        partial, final = self.partials[variant], self.finals[variant]
        if final.exists():
            if partial.exists():  # killed while it was being removed
                remove_partial(partial, JOURNAL)
            return read_report(final / REPORT)
        in_layers = {*self.in_layers, *self.outside}
        reports = self.reports[variant]
        quantized = {name for name, report in reports.items() if report.quantized}
        rest = self._all_dense([n for n in self.base.modules if n not in in_layers and n not in quantized])
        self._write_stage(len(self.stages), variant, rest, [])
        report = variant_report(self.encoder.names[variant], list(reports.values()), partial)
        head = self._head_module()
        unquantized = {name for name, module in self.base.modules.items() if is_linear(module)} - quantized
        dense = sorted(unquantized | ({head} - quantized))
        config = dict(self.base.config)
        if head in quantized:
            config["tie_word_embeddings"] = False
        made = self.encoder.quantization_config(variant, report, dense)
        named = named_for_loaders(made, {n: role.loader for n, role in self.roles.items()})
        if isinstance(self.encoder, KeyedEncoder):
            config |= self.encoder.config_fields(config, named)
        else:
            config["quantization_config"] = named
        write_json(partial / "config.json", config)
        write_text(partial / ROLES_NAME, dump_roles(self.roles))
        report = replace(report, left_dense=str(left_dense(open_checkpoint(partial))))
        used = {"rows": asdict(self.options.used)} if self.options.used is not None else {}
        write_json(partial / REPORT, {"variant": asdict(report), "made_by": self.journal, **used})
        sets = [*read_scaled_sets(self.base.path)]
        for number in range(self.model.depth):
            sets += self._read_list(partial, stage_sets(number), "sets", ScaledSet)
        if sets:
            write_text(partial / SCALING_NAME, dump_scaled_sets(sets))
        for path in other_files(self.base.path):
            shutil.copyfile(path, partial / path.name)
        for name, text in tokenizer_texts(self.base.path)[0].items():  # a file's that gives none, `run` tells
            write_text(partial / name, text)
        built = replace(open_checkpoint(partial), label=str(final))
        for _ in execute(plan_write(build_overlay(built, None), final, self.options.shard_mb)):
            pass
        remove_partial(partial, JOURNAL)
        return report


def _scaled_value(module: str, part: str, value: Tensor, scales: _Scales) -> Tensor:
    """An unquantized tensor on the CPU with what scaling does to it, not yet rounded to what it is stored as."""
    if module in scales.norms:
        scale, offset = scales.norms[module]
        shift = offset if part == "weight" else 0.0
        return (value.double() + shift) / scale.cpu().double() - shift
    if not scales.touches([module]):
        return value
    moved = _Scales(
        {name: found.cpu() for name, found in scales.columns.items()},
        {name: found.cpu() for name, found in scales.rows.items()},
    )
    return moved.bias(module, value) if part == "bias" else moved.weight(module, value.float())
