"""Same as `nanogpt records`."""

from nanogpt.lab.records import main

if __name__ == "__main__":
    main()
