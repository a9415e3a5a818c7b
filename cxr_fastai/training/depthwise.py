"""Depthwise convolutions in low precision on processors, with gradients that are computed in fp32.

oneDNN, with which torch computes convolutions on processors, has fast code for the gradients of a depthwise convolution
in fp32, but not in bf16: on an Intel Xeon with AMX those of 5x5 kernels take 5 times as long as in fp32, and those of
strides of 2 up to 30 times. They take two thirds of a bf16 training step of EfficientNet-Lite0, which is then slower
than in fp32. With fp32 gradients it is faster (`benchmarks/train_throughput.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Pair = list[int]


class DepthwiseGradients(TorchFunctionMode):
    """While entered, depthwise convolutions under autocast on a processor have gradients that are computed in fp32.

    Their outputs stay the same. All other operations are left as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_autocast_enabled('cpu'):
            return _convolve(*args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Compute `torch.conv2d` with its own arguments; depthwise on a processor, the gradients are computed in fp32."""
    is_depthwise = groups > 1 and weight.shape[1] == 1 and input.dim() == 4 and input.device.type == 'cpu'
    if not is_depthwise or isinstance(padding, str):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = [_pair(size) for size in (stride, padding, dilation)]
    return _DepthwiseConvolution.apply(input, weight, bias, *geometry)


def _pair(size: int | tuple[int, ...]) -> Pair:
    return [size, size] if isinstance(size, int) else list(size) * (2 // len(size))


class _DepthwiseConvolution(torch.autograd.Function):
    """A convolution with one group per input channel, in the type of autocast; its gradients are computed in fp32.

    It has no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        dtype = torch.get_autocast_dtype('cpu')
        # As torch saves them: gradient checkpointing compares the two.
        images, weight = images.to(dtype), weight.to(dtype)
        ctx.save_for_backward(images, weight)
        ctx.geometry = stride, padding, dilation
        ctx.has_bias = bias is not None
        return torch.conv2d(images, weight, bias, stride, padding, dilation, images.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias)
        of_images, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradients[0].float(),
            images.float(),
            weight.float(),
            [len(weight)],
            *ctx.geometry,
            transposed=False,
            output_padding=[0, 0],
            groups=images.shape[1],
            output_mask=needed,
        )
        of_images = of_images.to(images.dtype) if needed[0] else None
        return of_images, of_weight, of_bias, None, None, None
