"""A safetensors file of this project: whole or not at all, the same bytes whenever its contents are the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recompile.io.checksums import KEY, RUN, checksum_of_tensors
from recompile.io.files import write_with

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    checked: bool = False,
    run: str | None = None,
) -> None:
    """Write contiguous tensors of any shape and dtype, by name. Raises OutputError where it cannot be written.

    checked: with a checksum, which `open_tensors` looks at; tensors are on the CPU
    run: of which run the file is a part, told to `open_tensors` again
    The library sorts tensors by dtype and name, but has the metadata in another order in every process; here it is
    sorted by key.
    """
    from safetensors.torch import save_file

    if run is not None:
        metadata = {**(metadata or {}), RUN: run}
    if checked:
        metadata = {**(metadata or {}), KEY: checksum_of_tensors(tensors, tensors.__getitem__, metadata or {})}

    def write(scratch: Path) -> None:
        save_file(dict(tensors), scratch, dict(metadata) if metadata is not None else None)
        if metadata is not None and len(metadata) > 1:
            _sort_metadata(scratch)

    write_with(path, write)


def _sort_metadata(path: Path) -> None:
    """The header again in its place: as long as it was, since only keys change places."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the same keys and values in the spelling of serde_json"
        file.seek(8)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
