"""The helpers that run the tests of the kernels on a GPU, tested with the emulated kernels."""

import torch

from .conftest import OnDevice


def test_tensors_keep_their_layout_on_the_way_to_the_device_and_back(emulated, randn):
    carried = OnDevice(emulated.ops, "cpu")
    z, mask = torch.cat([randn(2, 8, 4, 4)] * 2, 1)[:, 1::2], randn(8, seed=1)
    assert carried._sent(z).stride() == z.stride() and carried._sent(z).storage_offset() == z.storage_offset()
    assert carried._sent(z).data_ptr() != z.data_ptr()
    ours, theirs = (ops.channel_scale_backward(z, z, mask, True, True) for ops in (carried, emulated.ops))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    state = [torch.zeros(size, dtype=torch.float64) for size in ((8, 8), 8, 8)]
    carried.channel_moments_update_(*state, z, torch.zeros(8, dtype=torch.float64))
    assert all(part.any() for part in state)
    assert torch.equal(carried.filter_spectral_norms([z], [None]), emulated.ops.filter_spectral_norms([z], [None]))
