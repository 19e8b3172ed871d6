"""Complete optimizers: decay, momentum, routing, averaging and settings around directions."""
