"""Runs every op with a CUDA kernel once per code path, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m bench.gpu_ops
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((3, 16, 7, 9), (2, 33, 4, 4), (5, 70))


def spectral(device: str) -> None:
    for dtype in DTYPES:
        sizes = [(5, 3, 3, 3), (4, 7, 1, 1), (3, 20, 5, 5), (6, 12), (2, 60, 9, 7), (2, 4, 8, 3, 3)]
        torch.ops.bdprune.filter_spectral_norms([random(size, dtype, device) for size in sizes], [None] * len(sizes))


def moments(device: str) -> None:
    for x, stack in maps(device):
        channels = x.shape[2 if stack else 1]
        leading = (x.shape[0],) if stack else ()
        shapes = [(*leading, channels, channels), *[(*leading, channels)] * 3]
        cross, total, norms, shift = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        for tensor_cores in (False, True):
            torch.ops.bdprune.channel_moments_update_(cross, total, norms, x, shift, tensor_cores)


def scale(device: str) -> None:
    for z, stack in maps(device):
        mask = random((z.shape[0], z.shape[2]) if stack else (z.shape[1],), torch.float32, device)
        torch.ops.bdprune.channel_scale(z, mask)
        for need in ((True, True), (True, False), (False, True)):
            torch.ops.bdprune.channel_scale_backward(z, z, mask, *need)


def conv(device: str) -> None:
    for dtype in DTYPES[:3]:
        for exact in (True, False):
            # 16 and 80 channels are whole vectors; 6 and 70 are not.
            for channels, filters, size, stride, groups in ((6, 70, 3, 1, 1), (16, 80, 1, 2, 1), (16, 80, 3, 2, 2)):
                x = random((2, 3, channels, 9, 7), dtype, device)
                weight = random((2, filters, channels // groups, size, size), dtype, device)
                mask = torch.ones(2, filters, device=device)
                mask[:, :64] = 0
                rest = ((stride, stride), (size // 2, size // 2), (1, 1), groups)
                for own in layouts(x):
                    for some in (*layouts(weight), weight[:1]):
                        for need_z in (False, True):
                            y, z = torch.ops.bdprune.stacked_conv2d(own, some, mask, None, *rest, need_z, exact)
                        for known in (None, z):
                            torch.ops.bdprune.stacked_conv2d_backward(y, known, some, mask, 9, 7, *rest, exact)


def stamp(device: str) -> None:
    for dtype in DTYPES:
        for channels, side in ((3, 8), (3, 7), (1, 5), (70, 3)):
            masks = torch.rand(2, 1, side, side, device=device).to(dtype)
            picks = torch.tensor([[0, 3, 1], [2, 2, 0]], device=device)
            for images in layouts(random((2, 2, channels, side, side), dtype, device)):
                for patterns in layouts(random((2, 1, channels, side, side), dtype, device)):
                    for some in (masks, None):
                        rest = (images.flatten(0, 1), some, patterns.flatten(0, 1), picks)
                        stamped = torch.ops.bdprune.stamp(*rest)
                        for need in ((True, True), (True, False), (False, True)):
                            torch.ops.bdprune.stamp_backward(stamped, *rest, *need)


OPS = {"filter_spectral_norms": spectral, "channel_moments_update_": moments, "channel_scale": scale}
OPS |= {"stacked_conv2d": conv, "stamp": stamp}


def maps(device: str) -> Iterator[tuple[Tensor, bool]]:
    """Feature maps of every dtype, shape and layout, single and as a stack of two."""
    for dtype in DTYPES:
        for shape in SHAPES:
            for x in layouts(random((2, *shape), dtype, device)):
                yield x[0], False
                yield x, True


def layouts(x: Tensor) -> list[Tensor]:
    """A stack ``[G, N, C, *]`` in contiguous and in channels_last order."""
    return [x, x.movedim(2, -1).contiguous().movedim(-1, 2)]


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def main() -> int:
    import bdprune.ops  # noqa: F401  registers the ops

    if not torch.cuda.is_available():
        print("bench.gpu_ops: PyTorch found no CUDA device", file=sys.stderr)
        return 2
    for name, run in OPS.items():
        run("cuda")
        torch.cuda.synchronize()
        print(f"{name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
