"""Files, journals, memory and sizes."""
