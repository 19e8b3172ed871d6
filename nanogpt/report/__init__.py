"""What finished runs say: curves, verdicts, tables, pictures."""
