"""Settings: what a run is, and the runs that have names. No JAX."""
