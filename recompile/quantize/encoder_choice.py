"""Which encoder `recompile.quantize` uses: by format and bitrates, by schemes, or by the sources of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.checkpoint.module_names import HEAD_NAMES, head_in
from recompile.errors import ArgumentError, FormatError, RecipeError
from recompile.events import Note, OnEvent, ignore
from recompile.formats import COMPRESSED, exl2, exl3
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.formats.schemes import parse_scheme
from recompile.model.tokens import Rows
from recompile.quantize import mlx_encoder
from recompile.quantize.encoder import Encoder
from recompile.quantize.encoders import EXL_FORMATS, EXL_HEAD_BITS, Exl2Encoder, Exl3Encoder, IntEncoder
from recompile.quantize.mix import MixEncoder, assign
from recompile.quantize.modifiers import load_modifiers
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from recompile.quantize.two_sided import OutputSource
from recompile.quantize.variant_specs import load_made_recipe
from recompile.recipe.recipe import DENSE, describe_spec


@dataclass(frozen=True)
class EncoderChoice:
    """What decides the stored form of variants; see `recompile.quantize`."""

    bits: tuple[float, ...]
    schemes: tuple[str, ...]
    modifiers: Path | None
    recipe: Path | None
    format: str
    method: str
    group_size: str
    asym: bool
    importance: bool
    head_bits: int | None
    codebook: str

    def encoder(
        self, base: Checkpoint, out: Path, rows: Rows, outputs: OutputSource | None, on_event: OnEvent = ignore
    ) -> tuple[Encoder, bool]:
        """The encoder, and whether it quantizes the head. outputs: statistics of gradients at outputs, for two-sided
        rounding. Raises ArgumentError, FormatError, RecipeError."""
        if self.format == MLX:
            mlx_encoder.check_base(base)
        if self.format == MLX and self.recipe is None:
            return self._with(outputs, self._of_mlx(base)), mlx_encoder.stores_head(base)
        if self.schemes or self.modifiers:
            return self._with(outputs, self._of_schemes(on_event)), False
        if self.recipe is not None:
            return self._of_recipe(base, out, rows, outputs, on_event)
        wanted = self
        if self.format in EXL_FORMATS and self.head_bits is None:
            wanted = replace(self, head_bits=EXL_HEAD_BITS)
        encoder, head = wanted._of_bits(rows)
        return self._with(outputs, encoder), head

    @staticmethod
    def _with(outputs: OutputSource | None, encoder: Encoder) -> Encoder:
        """The encoder with those statistics. Raises ArgumentError for one that rounds one-sided only."""
        if outputs is None:
            return encoder
        if not hasattr(encoder, "outputs"):
            raise ArgumentError(f"{{rounding}} two-sided: not for {encoder.description()['format']}")
        return replace(encoder, outputs=outputs)  # type: ignore[type-var]

    def _of_mlx(self, base: Checkpoint) -> Encoder:
        group_size = self.group_size
        variants = [mlx_encoder.affine(rate, group_size) for rate in self.bits]
        variants += [mlx_encoder.float_mode(name) for name in self.schemes]
        if len(set(variants)) != len(variants):
            raise ArgumentError("{bits}: a bitrate is given twice")
        head = None if self.head_bits is None else mlx_encoder.affine(self.head_bits, group_size)
        dtype = mlx_encoder.scale_dtype_of(base)
        embeddings = mlx_encoder.embeddings_of(base)
        return mlx_encoder.MlxEncoder(
            tuple(variants), base.config, embeddings, self.method, self.importance, dtype, head
        )

    def _of_bits(self, rows: Rows) -> tuple[Encoder, bool]:
        bits, shape = self.bits, (len(rows.ids), rows.ids.shape[1])
        if len(set(bits)) != len(bits):
            raise ArgumentError("{bits}: a bitrate is given twice")
        if self.format == exl2.FORMAT:
            return Exl2Encoder(bits, self.head_bits, *shape, self.method), True
        if self.format == exl3.FORMAT:
            return Exl3Encoder(bits, self.head_bits, self.codebook, *shape, self.method), True
        size = (
            None
            if self.group_size == "channel"
            else int(self.group_size)
            if re.fullmatch("[0-9]{1,9}", self.group_size)
            else 0
        )
        if size == 0:
            raise ArgumentError(f"{{group_size}} {self.group_size}: wanted a number such as 64, or channel")
        whole = [int(rate) for rate in bits if rate == int(rate)]
        if len(whole) != len(bits):
            raise ArgumentError("{bits}: compressed-tensors variants have whole bits, 2 to 8; mix them with a recipe")
        head = self.head_bits
        return IntEncoder(whole, size, not self.asym, self.method, self.importance, head_bits=head), head is not None

    def _of_schemes(self, on_event: OnEvent) -> Encoder:
        if self.modifiers is not None:
            variant, notes = load_modifiers(self.modifiers)
            for note in notes:
                on_event(Note(note))
            return SchemeEncoder((variant,), self.importance)
        variants = tuple(uniform(parse_scheme(name), self.method) for name in self.schemes)
        return SchemeEncoder(variants, self.importance)

    # ---- of a recipe's sources ---------------------------------------------------------------------------------------

    def _of_recipe(
        self, base: Checkpoint, out: Path, rows: Rows, outputs: OutputSource | None, on_event: OnEvent
    ) -> tuple[Encoder, bool]:
        assert self.recipe is not None, "asked before"
        format_name = format_of_mix(self.recipe, self.format)
        is_exl = format_name in EXL_FORMATS
        if self.head_bits is not None and not is_exl:
            raise ArgumentError("{head_bits}: in a mix a line for lm_head.* says what the head is")

        if format_name == MLX:
            mlx_encoder.check_base(base)

        def encoder_of(settings: Mapping[str, Any]) -> Encoder:
            if format_name == MLX:
                named = (str(settings["scheme"]),) if "scheme" in settings else ()
                rates = () if named else (float(settings["bits"]),)
                size = str(settings.get("group_size", self.group_size))
                one = replace(self, bits=rates, schemes=named, group_size=size, head_bits=None)
                return self._with(outputs, one._of_mlx(base))
            if "scheme" in settings:
                return self._with(outputs, self._of_source(str(settings["scheme"]), format_name))
            size, symmetric = settings.get("group_size", self.group_size), settings.get("symmetric", not self.asym)
            one = replace(
                self,
                format=format_name,
                bits=(float(settings["bits"]),),
                group_size="channel" if size is None else str(size),
                asym=not symmetric,
                head_bits=None,
            )
            return self._with(outputs, one._of_bits(rows)[0])

        of_head = {"bits": self.head_bits or EXL_HEAD_BITS, "format": format_name} if is_exl else None
        embeddings = mlx_encoder.embeddings_of(base) if format_name == MLX else None
        return mix_encoder(self.recipe, base, out, self.bits, encoder_of, of_head, on_event, embeddings)

    def _of_source(self, name: str, format_name: str) -> Encoder:
        """Of a source that is a scheme; for the head as well, where a line names it."""
        if format_name != COMPRESSED:
            raise ArgumentError(f"scheme {name}: is stored as compressed-tensors; leave out {{format}} {format_name}")
        scheme = parse_scheme(name)
        return SchemeEncoder((uniform(scheme, self.method),), self.importance, head_scheme=scheme)


def parse_rates(bits: Sequence[str]) -> tuple[float, ...]:
    """Bitrates as numbers. Raises FormatError."""
    try:
        rates = tuple(float(rate) for rate in bits)
        if not all(0 < rate <= 16 for rate in rates):  # NaN is not
            raise ValueError
        return rates
    except ValueError:
        raise ArgumentError(
            f"{{bits}} {' '.join(bits)}: wanted numbers above 0, at most 16 (tensor types go with {{format}} gguf)"
        ) from None


def format_of_mix(path: Path, asked: str) -> str:
    """The format of a recipe's mix: what its sources say, or else `asked`. Raises RecipeError where they differ."""
    recipe = load_made_recipe(path)
    specs = [source.spec for source in recipe.sources if source.spec is not None]
    if isinstance(recipe.base, dict):
        specs.append(recipe.base)
    said = {str(spec.get("format", asked)) for spec in specs if spec != DENSE}
    if len(said) > 1:
        raise RecipeError(f"{recipe.name}: sources of several formats, {', '.join(sorted(said))}; a mix has one")
    found = said.pop() if said else asked
    if found not in (COMPRESSED, *EXL_FORMATS, MLX) or asked not in (COMPRESSED, found):
        raise RecipeError(
            f"{recipe.name}: sources of format {found}, and {{format}} {asked}; "
            f"wanted exl2, exl3 or mlx, or {{format}} alone"
        )
    return found


def mix_encoder(
    recipe_path: Path,
    base: Checkpoint,
    out: Path,
    bits: Sequence[float],
    encoder_of: Callable[[Mapping[str, Any]], Encoder],
    of_head: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore,
    embeddings: Sequence[str] | None = None,
) -> tuple[MixEncoder, bool]:
    """The encoder of a recipe's mix, named as `out`, and whether it quantizes the head.

    bits: one bitrate for modules that no line names, where the recipe has no `base:`; encoder_of: of one source's spec;
    of_head: the spec of a head that no line names, None: it stays dense; embeddings: as `assign` takes them.
    """
    recipe = load_made_recipe(recipe_path)
    for warning in recipe.warnings:
        on_event(Note(warning, "Warning"))
    if len(bits) > 1:
        raise RecipeError("{recipe}: {bits} gives the bitrate of what no line names, so one number")
    unnamed: Mapping[str, Any] | None = recipe.base if isinstance(recipe.base, dict) else None
    if bits:
        unnamed = {"bits": bits[0]}
    specs = {source.model_dir: source.spec for source in recipe.sources if source.spec is not None}
    if unnamed is not None:
        specs[describe_spec(unnamed)] = unnamed
    head = head_in(base.modules) or HEAD_NAMES[0]
    assignment = assign(recipe, base, describe_spec(unnamed) if unnamed is not None else None, head, embeddings)
    if of_head is not None and head not in assignment:
        assignment[head] = describe_spec(of_head)
        specs[assignment[head]] = of_head
    assignment = {module: key for module, key in assignment.items() if specs.get(key) != DENSE}
    for spec in specs.values():
        if "bits" not in spec and "scheme" not in spec:
            kind = next(iter(spec), "nothing")
            raise RecipeError(
                f"{recipe.name}: a source given by {kind} cannot be made by model_quantize; wanted bits or a scheme"
            )
    used = set(assignment.values())
    lines = {source.model_dir: recipe.location(source) for source in recipe.sources}

    def made(key: str, spec: Mapping[str, Any]) -> Encoder:
        try:
            return encoder_of(spec)
        except (FormatError, ArgumentError) as error:
            raise RecipeError(f"{lines.get(key, recipe.name)}: {error}") from error

    encoders = {key: made(key, spec) for key, spec in specs.items() if key in used}
    if not encoders:
        raise RecipeError(f"{recipe.name}: quantizes nothing; give {{bits}}, a `base:` or a line that names a module")
    return MixEncoder(out.name, encoders, assignment), head in assignment
