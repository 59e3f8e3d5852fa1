"""The commands. Only this package imports click, rich and eval."""
