"""The enums that Python and the kernels share, each once. A test compares them with csrc's."""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "RULE_NAMES",
    "STATE_NAMES",
    "Action",
    "Activation",
    "LrScale",
    "NonFinite",
    "RowNorm",
    "Rule",
    "Slot",
]


class NonFinite(IntEnum):
    """What a NaN or inf gradient does."""

    PROPAGATE = 0
    ERROR = 1
    ZERO = 2
    SKIP = 3


class Action(IntEnum):
    """What a clip plan does to the gradients."""

    KEEP = 0
    SCALE = 1
    ZERO = 2
    REFUSE = 3
    SKIP = 4


class Rule(IntEnum):
    """The update of an optimizer."""

    ADAMW = 0
    SGD = 1
    ADAM = 2
    LAMB = 3
    LION = 4
    SCHEDULE_FREE = 5


class LrScale(IntEnum):
    """What multiplies the learning rate of each parameter."""

    NONE = 0
    UPDATE_CLIP = 1
    TRUST_RATIO = 2


class Activation(IntEnum):
    """The activation after a batch norm."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    SILU = 4
    GELU = 5
    GELU_TANH = 6
    HARDSWISH = 7
    SIGMOID = 8
    TANH = 9


class RowNorm(IntEnum):
    """A norm over the rows of its input; those that add take a residual and a dropout, and the last
    is that sum alone."""

    LAYER_NORM = 0
    ADD_LAYER_NORM = 1
    RMS_NORM = 2
    ADD_RMS_NORM = 3
    DROPOUT_ADD = 4

    @property
    def is_centred(self) -> bool:
        return self <= RowNorm.ADD_LAYER_NORM


class Slot(IntFlag):
    """The tensors of a parameter's state. SGD keeps its momentum_buffer in EXP_AVG, and
    ScheduleFreeAdamW its z."""

    EXP_AVG = 1
    EXP_AVG_SQ = 2
    MAX_EXP_AVG_SQ = 4
    MASTER_PARAM = 8
    STEP = 16
    WEIGHT_SUM = 32
    LR_MAX = 64


_OF_ALL = {Slot.MASTER_PARAM: "master_param", Slot.STEP: "step"}
_MOMENTS = {Slot.EXP_AVG: "exp_avg", Slot.EXP_AVG_SQ: "exp_avg_sq"}
_OF_ADAM = {**_MOMENTS, Slot.MAX_EXP_AVG_SQ: "max_exp_avg_sq", **_OF_ALL}

# The keys of an optimizer's state, as the usual implementations have them; master_param,
# weight_sum and lr_max are gradfuse's own.
STATE_NAMES = {
    Rule.ADAMW: _OF_ADAM,
    Rule.SGD: {Slot.EXP_AVG: "momentum_buffer", **_OF_ALL},
    Rule.ADAM: _OF_ADAM,
    Rule.LAMB: {**_MOMENTS, **_OF_ALL},
    Rule.LION: {Slot.EXP_AVG: "exp_avg", **_OF_ALL},
    Rule.SCHEDULE_FREE: {
        Slot.EXP_AVG: "z",
        Slot.EXP_AVG_SQ: "exp_avg_sq",
        **_OF_ALL,
        Slot.WEIGHT_SUM: "weight_sum",
        Slot.LR_MAX: "lr_max",
    },
}

# The optimizers' names, which begin their errors.
RULE_NAMES = {
    Rule.ADAMW: "AdamW",
    Rule.SGD: "SGD",
    Rule.ADAM: "Adam",
    Rule.LAMB: "LAMB",
    Rule.LION: "Lion",
    Rule.SCHEDULE_FREE: "ScheduleFreeAdamW",
}
