"""ResNet's bottleneck encoder with dilated last stages, and the decoder of DeepLab v3 (Chen et al., 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

EXPANSION = 4
DEEP_LAB_RATES = (12, 24, 36)


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class DilatedResNet(nn.Module):
    """Images `(batch, 3, H, W)` to features: stages 3 and 4 keep the resolution of stage 2 and widen their view.

    Args:
        layers: blocks in each of the four stages.
        width: channels of the stem; the output has 32 times as many.
        stem_stride: 2 as in torchvision, for an output stride of 8; 1 for small images, for an output stride of 4.
    """

    # As models of transformers say it, so that tasks on texts know that this is none of theirs.
    main_input_name = "pixel_values"

    def __init__(self, *, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, stem_stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stem_stride, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(width, width, layers[0])
        self.layer2 = _stage(4 * width, 2 * width, layers[1], stride=2)
        # As torchvision dilates: a stage's first block still has the dilation of the stage before.
        self.layer3 = _stage(8 * width, 4 * width, layers[2], first_dilation=1, dilation=2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], first_dilation=2, dilation=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(
    into: int, width: int, blocks: int, *, stride: int = 1, first_dilation: int = 1, dilation: int = 1
) -> nn.Sequential:
    first = Bottleneck(into, width, stride=stride, dilation=first_dilation)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * width, width, dilation=dilation) for _ in range(blocks - 1)))


class PyramidPooling(nn.Module):
    """Views of several widths side by side, and the whole picture's mean."""

    def __init__(self, into: int, out: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([_conv(into, out, 1), *(_conv(into, out, 3, rate) for rate in rates)])
        self.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(into, out, 1)))
        self.project = nn.Sequential(*_conv((len(rates) + 2) * out, out, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        views = [interpolate(conv(x), size=x.shape[-2:], mode="bilinear") for conv in self.convs]
        return self.project(torch.cat(views, 1))


def deep_lab_head(into: int, outputs: int, *, width: int = 256, rates: Sequence[int] = DEEP_LAB_RATES) -> nn.Sequential:
    """Features `(batch, into, h, w)` to `(batch, outputs, h, w)`, under torchvision's names for `DeepLabHead`."""
    return nn.Sequential(
        PyramidPooling(into, width, rates),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 1),
    )


def _conv(into: int, out: int, size: int, rate: int = 1) -> nn.Sequential:
    padding = 0 if size == 1 else rate
    conv = nn.Conv2d(into, out, size, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())
