"""Every attack that a manifest can name."""

from __future__ import annotations

from bdprune.attacks.adapt_distil import AdaptD
from bdprune.attacks.adapt_noise import AdvT
from bdprune.attacks.awp import AWP
from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack
from bdprune.attacks.blend import ABlend, Blend
from bdprune.attacks.dfst import DFST
from bdprune.attacks.drawn_patch import DrawnPatch
from bdprune.attacks.dynamic import Dynamic
from bdprune.attacks.evasive import Evasive
from bdprune.attacks.feature_collision import FeatureCollision
from bdprune.attacks.label_consistent import LabelConsistent
from bdprune.attacks.lira import LIRA
from bdprune.attacks.pruning_aware import PruningAware
from bdprune.attacks.sig import Sig
from bdprune.attacks.trojan import TrojanNeuron, TrojanWatermark
from bdprune.attacks.wanet import WaNet

_PATTERNS = (BadNets, DrawnPatch, TrojanWatermark, TrojanNeuron, Blend, ABlend)
_CLEAN_LABEL = (Sig, LabelConsistent, FeatureCollision)
_CHANGES = (WaNet, Dynamic, LIRA, DFST)
_BEYOND_DATA = (AWP, PruningAware, AdaptD, AdvT, Evasive)
ATTACKS: dict[str, type[Attack]] = {
    attack.kind: attack for attack in (*_PATTERNS, *_CLEAN_LABEL, *_CHANGES, *_BEYOND_DATA)
}
