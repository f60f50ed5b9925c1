"""Optimizers that unscale, clip, check and update in one pass.

torch.optim's Adam, AdamW and SGD, and Lion, LAMB and schedule-free AdamW, with gradient clipping
inside the step. The gradients are read once for their norm and once by the update, which multiplies
by the coefficient on its way. They are not written: clip and AdamW move 8 values per element where
torch's two calls move 10, or 12 with a GradScaler.
"""

from gradfuse.optim.adam import Adam
from gradfuse.optim.adamw import AdamW
from gradfuse.optim.grad_scaler import GradScaler
from gradfuse.optim.lamb import LAMB
from gradfuse.optim.lion import Lion
from gradfuse.optim.schedule_free import ScheduleFreeAdamW
from gradfuse.optim.sgd import SGD
from gradfuse.optim.torch_fused import clip_in_step

__all__ = [
    "LAMB",
    "SGD",
    "Adam",
    "AdamW",
    "GradScaler",
    "Lion",
    "ScheduleFreeAdamW",
    "clip_in_step",
]
