"""What an optimizer will do and has done: plans, costs, states keyed by parameter."""
