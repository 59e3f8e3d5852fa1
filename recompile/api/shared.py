"""What the verbs of the Python API share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from recompile.model.known_types import check_model_type

PathLike: TypeAlias = "str | os.PathLike[str]"
Verb = TypeVar("Verb", bound=Callable[..., object])


def as_path(given: PathLike | None) -> Path | None:
    """None stays None."""
    return None if given is None else Path(given)


def check_types(*models: PathLike | None) -> None:
    """Raise for models that cannot be run whatever else is asked, before the seconds that torch and transformers take
    to be imported. For what is certainly run."""
    for model in models:
        if model is not None:
            check_model_type(os.fspath(model))


def shares(common: Callable[..., object]) -> Callable[[Verb], Verb]:
    """For a function whose **keywords are the arguments of `common`: its signature shows them one by one."""
    shared = inspect.signature(common).parameters

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb)
        *named, events, rest = own.parameters.values()
        assert (events.name, rest.kind) == ("on_event", rest.VAR_KEYWORD), f"{verb.__name__}: on_event, **keywords last"
        known = {parameter.name for parameter in (*named, events)} | shared.keys()

        @functools.wraps(verb)
        def checked(*args: Any, **given: Any) -> Any:
            if unknown := [name for name in given if name not in known]:
                raise TypeError(f"{verb.__name__}() got an unexpected keyword argument {unknown[0]!r}")
            return verb(*args, **given)

        checked.__signature__ = own.replace(parameters=[*named, *shared.values(), events])  # type: ignore[attr-defined]
        return cast("Verb", checked)

    return decorate
