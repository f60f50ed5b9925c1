"""The blocks of residual nets, whose batch norms run with their residual and activation."""

from __future__ import annotations

from torch import Tensor, nn

from gradfuse.nn.batch_norm import BatchNormAct2d
from gradfuse.nn.blocks.parts import add_branch, begin_, check_count, check_share
from gradfuse.ops.batch_norm import check_activation

__all__ = ["BasicBlock", "Bottleneck", "PreActBlock"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Block(nn.Module):
    """What the blocks share: checked arguments, and first weights."""

    expansion = 1  # channels of the output over `channels`

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        activation: str | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_count(name, "in_channels", in_channels)
        check_count(name, "channels", channels)
        check_count(name, "stride", stride)
        check_activation(name, activation)
        self.activation = activation
        self.drop_path = check_share(name, "drop_path", drop_path)

    def reset_parameters(self) -> None:
        """Draws all weights anew: He et al. 2015; batch norms begin as the identity."""
        begin_(self, self.activation)

    def _norm(self, channels: int) -> BatchNormAct2d:
        return BatchNormAct2d(channels, activation=self.activation)

    def _drop_path(self) -> float:
        return self.drop_path if self.training else 0.0

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}"


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """A projection where the shape changes (He et al. 2016a, option B); else None."""
    if stride == 1 and in_channels == channels:
        return None
    norm = BatchNormAct2d(channels, activation=None)
    return nn.Sequential(_conv(in_channels, channels, 1, stride), norm)


class BasicBlock(_Block):
    """act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x)) for [N, in_channels, H, W].

    The output is [N, channels, ceil(H / stride), ceil(W / stride)]. Each batch norm runs with what
    follows it as one op; bn2 takes the dropped path as well.

    state_dict: that of torchvision's BasicBlock: conv1, bn1, conv2, bn2; downsample.0 (1 x 1
    convolution) and downsample.1 (batch norm) where stride or channels change.

    Args:
        in_channels, channels: of the input and the output.
        stride: of conv1 and the shortcut.
        activation: as of `BatchNormAct2d`.
        drop_path: probability that a sample's branch is dropped, in training; not while the batch
            norm that ends the branch is frozen in eval mode. Settable.

    Raises:
        TypeError, ValueError: an argument is no int >= 1, no known activation, or no probability.

    Source: He et al. 2016a, "Deep Residual Learning for Image Recognition", figures 2 and 5 left.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        activation: str | None = "relu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(in_channels, channels, stride, activation, drop_path)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = self._norm(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = self._norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        out = self.conv2(self.bn1(self.conv1(input)))
        output: Tensor = self.bn2(out, shortcut, self._drop_path())
        return output


class Bottleneck(_Block):
    """act(bn3(conv3(act(bn2(conv2(act(bn1(conv1(x)))))))) + shortcut(x)): 1 x 1, 3 x 3, 1 x 1.

    The output has 4 * channels. The stride is conv2's, as in torchvision; in the paper it is
    conv1's. Arguments and errors are those of BasicBlock.

    state_dict: that of torchvision's Bottleneck: conv1, bn1, conv2, bn2, conv3, bn3; downsample.0
    and downsample.1 where stride or channels change.

    Source: He et al. 2016a, "Deep Residual Learning for Image Recognition", figure 5 right.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        activation: str | None = "relu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(in_channels, channels, stride, activation, drop_path)
        outputs = self.expansion * channels
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = self._norm(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = self._norm(channels)
        self.conv3 = _conv(channels, outputs, 1)
        self.bn3 = self._norm(outputs)
        self.downsample = _shortcut(in_channels, outputs, stride)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        out = self.bn2(self.conv2(self.bn1(self.conv1(input))))
        output: Tensor = self.bn3(self.conv3(out), shortcut, self._drop_path())
        return output


class PreActBlock(_Block):
    """shortcut + conv2(act(bn2(conv1(act(bn1(x)))))): norm and activation before each convolution.

    The shortcut is the input itself, so that a signal passes 1,000 blocks unchanged; where stride
    or channels change it is a 1 x 1 convolution of act(bn1(x)). Arguments and errors are those of
    BasicBlock.

    state_dict: bn1, conv1, bn2, conv2; downsample (1 x 1 convolution) where stride or channels
    change.

    Source: He et al. 2016b, "Identity Mappings in Deep Residual Networks", figure 4(e).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        activation: str | None = "relu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(in_channels, channels, stride, activation, drop_path)
        self.bn1 = self._norm(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn2 = self._norm(channels)
        self.conv2 = _conv(channels, channels, 3)
        changes = stride != 1 or in_channels != channels
        self.downsample = _conv(in_channels, channels, 1, stride) if changes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: He et al. 2015; batch norms begin as the identity."""
        begin_(self, self.activation, self.conv2, self.downsample)

    def forward(self, input: Tensor) -> Tensor:
        h = self.bn1(input)
        shortcut = input if self.downsample is None else self.downsample(h)
        branch = self.conv2(self.bn2(self.conv1(h)))
        return add_branch("PreActBlock", shortcut, branch, drop_path=self._drop_path())
