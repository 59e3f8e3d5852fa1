"""Dense weight (and Hessian) to the stored parts of a format."""

from recompile.callable_rooms import make_callable

make_callable(__name__)
