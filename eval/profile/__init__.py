"""What every swap costs: exact, sketch, hybrid."""
