"""Same as `nanogpt demo, or nanogpt train`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
