"""A base and a recipe resolved to placements, checked and written."""

from recompile.callable_rooms import make_callable

make_callable(__name__)
