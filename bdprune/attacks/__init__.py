from bdprune.attacks.ablend import ABlend
from bdprune.attacks.base import Attack, AttackSetting, Shape, apply_trigger, shape_of
from bdprune.attacks.clean_label import CleanLabel
from bdprune.attacks.registry import ATTACKS
