"""`python -m nanogpt` is the command `nanogpt`."""

from nanogpt.cli import main

main()
