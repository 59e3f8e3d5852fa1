"""What every result file of a one-core benchmark says of its run: command, date, machine, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "bench_results"


def cpu_name() -> str:
    """Model of the CPU where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def birth_certificate() -> dict[str, Any]:
    """Taken before the work, so that the load is the machine's own. Of absolute paths only the last name is given."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy")}
    return {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *words]),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_1m": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **versions},
        "threads": 1,
    }


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write the newest result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}", file=sys.stderr)
