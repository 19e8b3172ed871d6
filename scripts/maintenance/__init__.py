"""What only maintainers run: recordings, parity, tables, benchmarks."""
