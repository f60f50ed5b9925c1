"""Times gradient clipping: the same as `python -m gradfuse bench clip`."""

import sys

from gradfuse.bench.command import main

if __name__ == "__main__":
    sys.exit(main(["clip", *sys.argv[1:]]))
