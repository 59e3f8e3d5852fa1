"""The Python API: what every command does, as a function with plain arguments.

    import recompile

    recompile.quantize("base", "variants", bits=[2, 3, 4, 6])
    recompile.profile("base", "variants/3bpw", ["variants/2bpw", "variants/4bpw", "variants/6bpw"], mode="sketch")
    found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
    recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml")

Arguments have the defaults of the commands. Each function returns a report, and goes on where an interrupted call with
the same arguments stopped, as the command does. `on_event` is called with what happens on the way (recompile.events:
Progress for a bar, Note for people, and events of the work). Wrong arguments raise ArgumentError, every other expected
failure another RecompileError, with one line that says what to do.
"""

from __future__ import annotations

from recompile.api.build import heal, quantize, trace
from recompile.api.choose import frontier, optimize, profile
from recompile.api.compare import diff, diff_many, engine_diff, engines, install_engine, report
from recompile.api.write import check, emit, load_recipe, merge, open_checkpoint

__all__ = [
    "check",
    "diff",
    "diff_many",
    "emit",
    "engine_diff",
    "engines",
    "frontier",
    "heal",
    "install_engine",
    "load_recipe",
    "merge",
    "open_checkpoint",
    "optimize",
    "profile",
    "quantize",
    "report",
    "trace",
]
