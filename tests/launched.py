"""Runs a script of several gloo processes, and leaves before the interpreter takes itself down.

gloo's threads release the tensors of the last collective under the GIL, which aborts a process
that is already on its way out, after all its work (pytorch#179291).
"""

import os
import runpy
import sys

runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
