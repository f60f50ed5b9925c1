"""Times batch norm: the same as `python -m gradfuse bench-batch-norm`."""

import sys

from gradfuse.bench.batch_norm import main

if __name__ == "__main__":
    sys.exit(main())
