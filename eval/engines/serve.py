"""What runs in an engine's own environment: reads requests on stdin, answers on stdout. Standard library only.

    python -I serve.py in_vllm.py

The second file is the engine's: `load(request)` returns a loaded model and what is to be known of it;
`score(model, ids)` yields heads (dicts) with raw bytes, of one row. A request is one line of JSON. An answer is one
line of JSON, followed by as many raw bytes as its "bytes" says; 0 ends a row. What the engine prints goes to stderr,
whichever stream it meant.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO


def serve(engine: Mapping[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, a line of JSON each, until there are no more; runs in the engine's own environment."""
    model: Any = None

    def answer(head: Mapping[str, Any], data: bytes = b"") -> None:
        answers.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n" + data)
        answers.flush()

    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                model, about = engine["load"](request)
                answer({"ok": True, **about})
            else:
                for head, data in engine["score"](model, request["ids"]):
                    answer({"ok": True, **head}, data)
                answer({"ok": True})
        except Exception as error:  # an engine's own errors are of any kind; the parent says them
            said = (str(error).strip().splitlines() or [""])[0][:400]
            answer({"ok": False, "error": f"{type(error).__name__}: {said}"})


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(runpy.run_path(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
