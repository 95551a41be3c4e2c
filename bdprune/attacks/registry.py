"""Every attack that a manifest can name."""

from __future__ import annotations

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack
from bdprune.attacks.blend import Blend

ATTACKS: dict[str, type[Attack]] = {attack.kind: attack for attack in (BadNets, Blend)}
