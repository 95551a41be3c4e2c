"""The state of torch that a program may have set before it calls this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bdprune.errors import OptionError


@contextmanager
def plain_torch() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller has set; it is restored afterwards.

    A notebook may have turned gradients off, without which nothing can be unlearned or repaired. Under autocast, the
    figures would be those of another precision than the record names.

    Raises:
        OptionError: the default dtype is not float32, in which networks and images are made.
    """
    default = torch.get_default_dtype()
    if default != torch.float32:
        hint = "Call torch.set_default_dtype(torch.float32) before bdprune."
        raise OptionError(f"The default dtype of torch is {default}, and bdprune computes in float32.", hint)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
