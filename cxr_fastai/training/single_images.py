"""`SingleImages` lets a network with BatchNorm train on a batch of one image, such as the rest of an epoch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxr_fastai.core.errors import CXRWarning


class SingleImages(Callback):
    """Normalise a training batch of one image with running statistics, in layers that see one value per channel.

    A BatchNorm layer behind a pooling layer has a single value per channel of one image. It cannot estimate a variance
    from it, and torch raises an error, often in the last batch of the first epoch. With this callback such a layer uses
    its running statistics for that batch, as in validation, and does not update them. So every image is used once per
    epoch, and the batches stay the same. The first such batch causes a `CXRWarning`.

    In distributed training this concerns the part of a batch that a process gets.
    """

    order = 13  # after MixUp and the precision, which change the batch and the type of its numbers

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.has_warned = False

    def before_batch(self) -> None:
        if not self.training or len(self.xb[0]) != 1:
            return
        self.layers = [layer for layer in self._single_valued_layers() if layer.training]
        for layer in self.layers:
            layer.eval()
        if self.layers and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                'a training batch has one image, from which BatchNorm cannot estimate statistics, so '
                f'{len(self.layers)} of its layers use their running statistics. Choose another batch size than '
                f'{self.dl.bs} to avoid this.',
                CXRWarning,
                stacklevel=2,
            )

    def after_pred(self) -> None:
        for layer in self.layers:
            layer.train()
        self.layers = []

    def _single_valued_layers(self) -> list[nn.Module]:
        """Return the BatchNorm layers whose input has one value per channel for the current batch."""
        network = self.learn.network
        layers: list[nn.Module] = []

        def collect(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                layers.append(layer)

        modes: dict[nn.Module, Any] = {module: module.training for module in network.modules()}
        hooks = [module.register_forward_pre_hook(collect) for module in modes if isinstance(module, _BatchNorm)]
        try:
            network.eval()
            with torch.no_grad():
                network(*self.xb)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for hook in hooks:
                hook.remove()
        return layers
