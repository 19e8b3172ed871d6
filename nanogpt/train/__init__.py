"""Training one run: data, step, loop, checkpoints, what is written."""
