"""Costs and a budget to one choice per group. Numbers only."""
