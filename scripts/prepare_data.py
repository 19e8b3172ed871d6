"""Same as `nanogpt data`."""

from nanogpt.lab.data import main

if __name__ == "__main__":
    main()
