"""Dense weight (and Hessian) to the stored parts of a format."""
