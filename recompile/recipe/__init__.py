"""Override files: values, YAML, globs, compression."""
