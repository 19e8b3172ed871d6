"""Inverse roots and eigenbases of stacks of factors, and what each costs."""
