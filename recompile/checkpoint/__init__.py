"""A checkpoint opened lazily: names, dtypes, shapes, byte ranges, config."""
