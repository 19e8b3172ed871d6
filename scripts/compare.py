"""Same as `nanogpt compare`."""

from nanogpt.lab.compare import main

if __name__ == "__main__":
    main()
