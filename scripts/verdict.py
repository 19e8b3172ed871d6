"""Same as `nanogpt verdict`."""

from nanogpt.lab.verdict import main

if __name__ == "__main__":
    main()
