"""Streaming first and second moments of the channels of feature maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_feature_map, check_same_device

_CONSTANT = 1e-4
"""A variance below this share of (mean - shift)^2 is rounding error of a constant channel. The shift is the mean of the
first batch, so a channel that varies is far above (sums within a chunk are float32, with noise of 1e-5)."""


class ChannelMoments:
    """Counts, means, activation norms and cross moments of C channels over any number of batches, in constant memory.

    Args:
        num_channels: C, at least 1.
        device: device of the sums and the batches; the CPU by default.
        stack: G for the moments of a stack of maps. Batches are then ``[G, N, C]`` or ``[G, N, C, *]``, every result
            has G as its first axis, and all are bit for bit those of G objects.
        precision: of products of float32 and narrower maps on a GPU: ``ieee`` float32, or ``tf32x3``, three TF32
            products on tensor cores for each, equal up to the last bits. The CPU always uses ``ieee``.

    The batches are shifted by the mean of the first batch before squaring. Products are summed in float32 within chunks
    of 256 positions (float64 for float64 input) and merged in float64. So the correlation is accurate to about 1e-7 for
    a mean of 30 standard deviations; the error of unshifted float32 is 3e-4.

    Values of float32 input must stay below 1e18 in magnitude: their squares must fit float32.

    Source: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983; Schubert and Gertz, Numerically
    stable parallel computation of (co-)variance, SSDBM 2018.

    >>> moments = ChannelMoments(2)
    >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    >>> moments.mean
    tensor([2., 4.], dtype=torch.float64)
    >>> moments.correlation()
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_channels: int,
        device: torch.device | str | None = None,
        stack: int | None = None,
        precision: Literal["ieee", "tf32x3"] = "ieee",
    ) -> None:
        if num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {num_channels}")
        if stack is not None and stack < 1:
            raise ValueError(f"stack must be at least 1, got {stack}")
        if precision not in ("ieee", "tf32x3"):
            raise ValueError(f"precision must be ieee or tf32x3, got {precision!r}")
        self.num_channels = num_channels
        self.stack = stack
        self._tensor_cores = precision == "tf32x3"
        self.count = 0
        """Samples N added so far."""
        self.positions = 0
        """Values per channel added so far: N times the positions of a map."""
        shape = (num_channels,) if stack is None else (stack, num_channels)
        self._cross = torch.zeros(*shape, num_channels, dtype=torch.float64, device=device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._norm_sum = torch.zeros_like(self._sum)
        self._shift = torch.zeros_like(self._sum)

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self._sum.device

    def update(self, x: Tensor) -> None:
        """Adds a batch ``[N, C]`` or ``[N, C, *]``; for a stack ``[G, N, C]`` or ``[G, N, C, *]``.

        Takes any floating dtype; reads NCHW and channels_last in place.

        Empty batches change nothing. No gradient flows.

        Raises:
            TypeError: x is not a floating tensor.
            ValueError: its shape or device does not fit.
        """
        check_feature_map("x", x)
        sizes = x.shape if self.stack is None else x.shape[1:]
        if self.stack is not None and (x.dim() < 3 or x.shape[0] != self.stack):
            raise ValueError(f"x must be a stack of {self.stack} maps, got shape {list(x.shape)}")
        if sizes[1] != self.num_channels:
            raise ValueError(f"x must have {self.num_channels} channels, got shape {list(x.shape)}")
        check_same_device("x", x, self.device)
        if x.numel() == 0:
            return
        with torch.no_grad():
            if self.positions == 0:
                self._shift = (
                    _provisional_mean(x) if self.stack is None else torch.stack(list(map(_provisional_mean, x)))
                )
            _update(self._cross, self._sum, self._norm_sum, x.detach(), self._shift, self._tensor_cores)
        self.count += sizes[0]
        self.positions += sizes.numel() // self.num_channels

    def merge(self, other: ChannelMoments) -> None:
        """Adds the batches of ``other``, as if they had been passed to :meth:`update`.

        Raises:
            ValueError: the number of channels or of maps differs.
        """
        if other.stack != self.stack:
            raise ValueError(f"cannot merge moments of a stack of {other.stack} into one of {self.stack}")
        if other.num_channels != self.num_channels:
            raise ValueError(f"cannot merge moments of {other.num_channels} channels into {self.num_channels}")
        if other.positions == 0:
            return
        cross, total, norm_sum, shift = (
            tensor.to(self.device) for tensor in (other._cross, other._sum, other._norm_sum, other._shift)
        )
        if self.positions == 0:
            self._shift = shift.clone()
        # Re-centre the other's sums from its shift to ours: x - s = (x - s') + (s' - s).
        delta = shift - self._shift
        mixed = _outer(total, delta)
        self._cross += cross + mixed + mixed.mT + other.positions * _outer(delta, delta)
        self._sum += total + other.positions * delta
        self._norm_sum += norm_sum
        self.count += other.count
        self.positions += other.positions

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over samples and positions, float64 ``[C]`` (``[G, C]`` for a stack, and so on)."""
        return self._shift + self._sum / self._filled()

    @property
    def variance(self) -> Tensor:
        """Population variance of each channel (divided by the number of values), float64 ``[C]``, at least 0."""
        return self._centred().diagonal(dim1=-2, dim2=-1).clone()

    @property
    def activation_norm(self) -> Tensor:
        """Mean over samples of the L2 norm of the channel's map, over the root of its positions, float64 ``[C]``."""
        self._filled()
        return self._norm_sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Population covariance of the channels, float64 ``[C, C]``, symmetric."""
        return self._centred()

    def correlation(self) -> Tensor:
        """Pearson correlation of the channels, float64 ``[C, C]``, within [-1, 1].

        A constant channel has no correlation: it gets 0 with every other channel and 1 with itself. A channel that is
        not finite gets NaN.
        """
        covariance = self._centred()
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        noise = _CONSTANT * (self._sum / self.positions).square()
        constant = variance <= noise
        deviation = variance.where(~constant, torch.ones_like(variance)).sqrt()
        correlation = (covariance / _outer(deviation, deviation)).clamp(-1.0, 1.0)
        correlation = correlation.masked_fill(constant[..., None, :] | constant[..., None], 0.0)
        diagonal = torch.ones_like(variance).where(variance.isfinite(), torch.nan)
        return correlation.diagonal_scatter(diagonal, dim1=-2, dim2=-1)

    def _centred(self) -> Tensor:
        count = self._filled()
        covariance = (self._cross - _outer(self._sum, self._sum) / count) / count
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0.0)
        return covariance.diagonal_scatter(variance, dim1=-2, dim2=-1)

    def _filled(self) -> int:
        if self.positions == 0:
            raise ValueError("no values have been added: call update first")
        return self.positions


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``[..., C]`` and ``[..., C]`` -> ``[..., C, C]``."""
    return a[..., :, None] * b[..., None, :]


def _provisional_mean(x: Tensor) -> Tensor:
    """Mean of the batch as float64 ``[C]``, rounded to float32 so that every kernel subtracts the same number."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(dims, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    rounded = mean.float().double()
    # float64 input may exceed float32; a batch that is not finite makes its channel NaN with any shift.
    return torch.where(rounded.isfinite(), rounded, mean.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def _update(cross: Tensor, total: Tensor, norm_sum: Tensor, x: Tensor, shift: Tensor, tensor_cores: bool) -> None:
    if _backend.is_native(x):
        torch.ops.bdprune.channel_moments_update_(cross, total, norm_sum, x, shift, tensor_cores)
    else:
        reference.channel_moments_update_(cross, total, norm_sum, x, shift)


def _fake(cross: Tensor, sum: Tensor, norm_sum: Tensor, x: Tensor, shift: Tensor, tensor_cores: bool = False) -> None:
    return None


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::channel_moments_update_", _fake)
