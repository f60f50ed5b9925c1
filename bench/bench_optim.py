"""Times clip and update: the same as `python -m gradfuse bench optim`."""

import sys

from gradfuse.bench.command import main

if __name__ == "__main__":
    sys.exit(main(["optim", *sys.argv[1:]]))
