"""Blocks, and how parameters are read and cut into them."""
