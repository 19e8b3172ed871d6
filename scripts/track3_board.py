"""Same as `nanogpt records`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["records", *sys.argv[1:]])
