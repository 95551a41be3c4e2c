from bdprune.attacks.ablend import ABlend
from bdprune.attacks.base import Attack, Setting, Shape, apply, shape_of
from bdprune.attacks.clean_label import CleanLabel
from bdprune.attacks.registry import ATTACKS
