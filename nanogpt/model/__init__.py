"""The GPT: modules, initial weights, loss."""
