"""The pure-torch meaning of every op: the fallback without the compiled module, the tests' oracle.

One file per stem. The functions at the end of each have the names and arguments of gradfuse._C.
"""

from gradfuse.reference.adaptive_clip import *  # noqa: F403
from gradfuse.reference.batch_norm import *  # noqa: F403
from gradfuse.reference.clip import *  # noqa: F403
from gradfuse.reference.optim import *  # noqa: F403
