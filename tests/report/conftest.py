"""What the tests of the report share: node, and problems in the form that the page's solver reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPORT = Path(__file__).resolve().parents[2] / "eval" / "report"


@pytest.fixture(scope="session")
def node() -> Callable[[str, Any], Any]:
    """run(code, value): the JSON that `code` (a function body with `input` and `load(NAME)`) returns in node."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed: the page's solver is not compared with Python's")

    def run(code: str, value: Any) -> Any:
        script = (
            "const load = (name) => require(" + json.dumps(str(REPORT)) + " + '/' + name);"
            "const input = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
            f"const answer = (() => {{ {code} }})(); process.stdout.write(JSON.stringify(answer));"
        )
        found = subprocess.run([program, "-e", script], input=json.dumps(value), capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    return run
