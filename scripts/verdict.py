"""Same as `nanogpt verdict`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["verdict", *sys.argv[1:]])
