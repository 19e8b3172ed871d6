"""Checks of options, arithmetic in wider dtypes, paths in trees: what every room stands on."""
