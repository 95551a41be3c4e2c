from bdprune.attacks.base import Attack, AttackSetting, CleanLabel, Shape, apply_trigger, shape_of
from bdprune.attacks.blend import ABlend
from bdprune.attacks.registry import ATTACKS
