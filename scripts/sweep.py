"""Same as `nanogpt sweep`."""

from nanogpt.lab.sweep import main

if __name__ == "__main__":
    main()
