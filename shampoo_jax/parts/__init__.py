"""Transformations of stacks: statistics, roots, preconditioning, grafts, monitors."""
