"""Rooms that share their name with a verb of the Python API: `recompile.quantize(...)` is `recompile.api.quantize`.

`import recompile.quantize.gptq` sets the attribute `quantize` of the package to the room, whatever stood there; so the
room itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A package that can be called: it is the verb of the same name then, `recompile.merge(...)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb(*args, **options)

    @property
    def _verb(self) -> Any:
        import recompile

        return recompile.load_verb(self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._verb)


def make_callable(name: str) -> None:
    """Of a module that is being imported."""
    sys.modules[name].__class__ = CallableRoom
