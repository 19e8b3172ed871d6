"""Same as `nanogpt data`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
