"""Costs and a budget to one choice per group. Numbers only."""

from recompile.callable_rooms import make_callable

make_callable(__name__)
