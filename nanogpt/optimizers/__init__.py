"""Optimizers by parameter: directions, schedules, what they cost."""
