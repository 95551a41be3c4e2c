"""The trigger of the planted backdoor, as a search would recover it at best."""

from __future__ import annotations

import torch

from bdprune.analysis import Outstanding
from bdprune.loops import Trigger
from bdprune.testing.planted import Planted


def true_trigger(known: Planted) -> Outstanding:
    """Mask and colours of the pixels that the trigger sets."""
    black, white = (known.trigger(torch.full((1, 3, 16, 16), value))[0] for value in (0.0, 1.0))
    mask = (black == white).all(0, keepdim=True).float()
    trigger = Trigger(mask, black * mask, known.target, flip_rate=1.0, images=100)
    return Outstanding(trigger, 4.0, trigger.size, tuple([4 * trigger.size] * 9))
