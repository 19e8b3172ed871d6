"""From parameter trees to stacks of equal blocks at their owners, and back."""
