"""Hidden states that live in a file: what is larger than memory, and is gone when nobody refers to it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from recompile.errors import OutputError
from recompile.io.memory import format_mib


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """Zeros [*shape] on the CPU, mapped from a file without a name.

    folder: where the file is; None: where temporary files are. Raises OutputError where there is no room for it.
    """
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".states-") as file:
            file.truncate(count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).reshape(shape)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"{folder or tempfile.gettempdir()}: no scratch file of {format_mib(count * dtype.itemsize)} for hidden "
            f"states ({error}); make room, set TMPDIR, or raise {{max_memory}}"
        ) from error
