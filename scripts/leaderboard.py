"""Same as `nanogpt board`."""

from nanogpt.lab.board import main

if __name__ == "__main__":
    main()
