"""How batch norms behave while a method trains on very few images."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_running_statistics(module: nn.Module) -> None:
    """Puts every batch norm of ``module`` in eval mode, so that it uses its running statistics and keeps them."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()
