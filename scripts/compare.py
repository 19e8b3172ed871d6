"""Same as `nanogpt compare`."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
