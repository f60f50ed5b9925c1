"""Times gradient clipping: the same as `python -m gradfuse bench`."""

import sys

from gradfuse.bench.clip import main

if __name__ == "__main__":
    sys.exit(main())
