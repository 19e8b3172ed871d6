"""Faults done to real processes: what `make faults` and the tests of nothing lost share."""
