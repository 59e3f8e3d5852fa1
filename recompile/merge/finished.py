"""Whether an output is there already, as an earlier run of the same merge left it: then only its bytes are to be read.

A merge that is killed while it verifies has its output whole under its name. Run again, it goes on with verifying."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recompile.errors import RecompileError
from recompile.io.files import MARKER_NAME, open_regular, read_json
from recompile.merge.configs import dump_json
from recompile.merge.manifest import make_manifest
from recompile.merge.write_gguf import HEX, GgufPlan
from recompile.merge.write_plan import MANIFEST_NAME, WritePlan


def is_finished(plan: WritePlan | GgufPlan) -> bool:
    """Whether every file of the plan stands under its name, and all but the bytes of tensors is as planned.

    A manifest, and the keys of a GGUF file, hold inputs (names and fingerprints), recipe and settings.
    """
    try:
        return _gguf(plan) if isinstance(plan, GgufPlan) else _directory(plan)
    except (OSError, RecompileError):
        return False


def _directory(plan: WritePlan) -> bool:
    manifest = read_json(plan.out / MANIFEST_NAME)
    hashes = _hashes(manifest.get("modules") if isinstance(manifest, dict) else None)
    if hashes is None or hashes.keys() != {module.name for module in plan.modules}:
        return False
    texts = {**plan.texts, MANIFEST_NAME: dump_json(make_manifest(plan, hashes))}
    names = {*texts, *(source.name for source in plan.copies), *(shard.file for shard in plan.shards)}
    return (
        {path.name for path in plan.out.iterdir()} - {MARKER_NAME} == names
        and all(_content(plan.out / name) == text.encode() for name, text in texts.items())
        and all((plan.out / shard.file).stat().st_size == shard.size_bytes for shard in plan.shards)
        and all(filecmp.cmp(source, plan.out / source.name, shallow=False) for source in plan.copies)
    )


def _hashes(modules: Any) -> Mapping[str, str] | None:
    """Module -> hash, of a manifest that may be anything."""
    if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
        return None
    return {name: entry.get("sha256", "") for name, entry in modules.items()}


def _content(path: Path) -> bytes:
    with open_regular(path, kind="json") as file:
        return file.read()


def _gguf(plan: GgufPlan) -> bool:
    for shard in plan.shards:
        wanted = bytearray(shard.layout.header)
        with open_regular(shard.path) as file:
            found = bytearray(file.read(len(wanted)))
        if shard.hashes_at is not None:  # written last; verifying compares them with the tensors
            for header in (wanted, found):
                header[shard.hashes_at : shard.hashes_at + HEX * len(plan.tensors)] = b""
        if found != wanted:
            return False
    return bool(plan.shards)
