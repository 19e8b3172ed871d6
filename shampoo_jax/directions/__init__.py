"""Chains of parts that make a direction: one `scale_by_*` function each."""
