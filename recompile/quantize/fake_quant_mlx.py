"""How an MLX candidate is made on the fly: what `model_quantize --format mlx --method mse` writes, sizes to the bit.

As in the files, embeddings and a head of its own are quantized with everything else; a tied head is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, split_name
from recompile.checkpoint.module_names import head_in
from recompile.errors import ArgumentError, FormatError
from recompile.formats import mlx, mlx_config
from recompile.formats.mlx_config import MlxScheme
from recompile.quantize.fake_quant import Importances, SharedEncodings, Stored, linear_modules, store_alike
from recompile.quantize.mlx_encoder import (
    MlxEncoder,
    affine,
    check_base,
    embeddings_of,
    float_mode,
    scale_dtype_of,
    stores_head,
)


@dataclass(frozen=True)
class MlxMaker:
    """One scheme of MLX, affine bits or a mode of small floats; every weight is encoded once."""

    scheme: MlxScheme
    shared: SharedEncodings = field(default_factory=SharedEncodings, compare=False)
    bytes_per_weight: int = 32  # float32 copies, codes and the 64-bit words that they are packed by

    def store(self, base: Checkpoint) -> Stored:
        """Raises FormatError for a model whose tensors mlx-lm renames or changes."""
        check_base(base)
        dtype = scale_dtype_of(base)
        encoder = self._encoder(dtype)
        head = head_in(base.modules) if stores_head(base) else None
        names = dict.fromkeys([*embeddings_of(base), *linear_modules(base), *([] if head is None else [head])])

        def parts_of(shape: tuple[int, ...]) -> Mapping[str, Tensor]:
            return empty_parts(self.scheme, (shape[0], shape[1]), dtype)

        stored = store_alike(base, names, mlx_config.QUANT_METHOD, encoder.why_not, parts_of)
        sizes: dict[str, int] = {}
        for tensor, info in stored.tensors.items():
            module, part = split_name(tensor)
            sizes[module] = sizes.get(module, 0) + (info.size_bytes if part != "bias" else 0)
        for module in stored.formats:
            self.shared.ask(module, self._form, sizes[module])
        return stored

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        parts = self.shared.get(module, self._form)
        if parts is None:
            columns = (importance or {}).get(module)
            hessian = torch.diag(columns.to(weight.device)) if columns is not None and bool(columns.any()) else None
            (made,) = self._encoder(scale_dtype_of(base)).encode({module: weight.float()}, hessian, {})
            parts = {part: value.cpu() for part, value in made[module].parts.items()}
            self.shared.put(module, self._form, parts)
        return mlx.dequantize({part: value.to(weight.device) for part, value in parts.items()}, self.scheme, module)

    def _encoder(self, scale_dtype: torch.dtype) -> MlxEncoder:
        return MlxEncoder((self.scheme,), {}, method="mse", scale_dtype=scale_dtype)

    @property
    def _form(self) -> str:
        return f"mlx {self.scheme.mode} {self.scheme.bits} {self.scheme.group_size}"

    @property
    def kept_bytes(self) -> int:
        return self.shared.most_bytes

    def description(self) -> Mapping[str, Any]:
        return {"format": mlx_config.QUANT_METHOD, **self.scheme.entry(), "method": "mse"}

    @property
    def group(self) -> None:
        return None


def empty_parts(scheme: MlxScheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of a weight [out, in] as MLX stores it, on the meta device: shapes and dtypes alone."""
    (out_features, in_features), affine = shape, scheme.mode == "affine"
    grid = (out_features, in_features // scheme.group_size)
    words = torch.empty((out_features, in_features * scheme.bits // 32), dtype=torch.uint32, device="meta")
    scales = torch.empty(grid, dtype=scale_dtype if affine else torch.uint8, device="meta")
    return {"weight": words, "scales": scales, **({"biases": torch.empty_like(scales)} if affine else {})}


def maker_for(spec: Mapping[str, Any], group_size: int, shared: SharedEncodings) -> MlxMaker:
    """The maker of `{bits: 4, format: mlx}` or `{scheme: mxfp4, format: mlx}`.

    group_size: of affine bits where the spec says none. Raises FormatError for what MLX does not have."""
    if ("bits" in spec) == ("scheme" in spec) or set(spec) - {"bits", "scheme", "group_size", "format"}:
        raise FormatError(f"{dict(spec)}: wanted bits (and optionally group_size) or a scheme, and format")
    try:
        if "scheme" in spec:
            return MlxMaker(float_mode(str(spec["scheme"])), shared)
        return MlxMaker(affine(spec["bits"], str(spec.get("group_size", group_size))), shared)
    except ArgumentError as error:
        raise FormatError(str(error)) from None
