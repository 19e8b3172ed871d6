"""Same as `nanogpt sweep`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
