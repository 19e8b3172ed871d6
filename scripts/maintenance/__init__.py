"""What only maintainers run: recordings, tables, pages, measurements."""
