"""Times layer norm: the same as `python -m gradfuse bench layer_norm`."""

import sys

from gradfuse.bench.command import main

if __name__ == "__main__":
    sys.exit(main(["layer_norm", *sys.argv[1:]]))
