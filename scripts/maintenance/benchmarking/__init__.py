"""What the benchmarks share: one timing rule, one set of matrices, tables and pictures."""
