"""Same as `nanogpt board`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["board", *sys.argv[1:]])
