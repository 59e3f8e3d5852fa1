"""Journals as tests damage them."""

from __future__ import annotations

import re
from pathlib import Path


def unsealed(path: Path) -> Path:
    """The same file without checksums, as one of an earlier version or made by hand is."""
    path.write_bytes(re.sub(rb', "crc32": "[0-9a-f]{8}"}$', b"}", path.read_bytes(), flags=re.MULTILINE))
    return path
