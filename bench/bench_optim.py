"""Times clip and update: the same as `python -m gradfuse bench-step`."""

import sys

from gradfuse.bench.optim import main

if __name__ == "__main__":
    sys.exit(main())
