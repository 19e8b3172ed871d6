"""Functions of stacked matrices: arrays in, arrays out, no pytrees, no state."""
