"""Times batch norm: the same as `python -m gradfuse bench batch_norm`."""

import sys

from gradfuse.bench.command import main

if __name__ == "__main__":
    sys.exit(main(["batch_norm", *sys.argv[1:]]))
