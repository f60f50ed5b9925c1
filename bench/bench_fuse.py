"""Times fused models: the same as `python -m gradfuse bench fuse`."""

import sys

from gradfuse.bench.command import main

if __name__ == "__main__":
    sys.exit(main(["fuse", *sys.argv[1:]]))
