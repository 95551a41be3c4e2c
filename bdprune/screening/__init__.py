from bdprune.screening.head import HEAD_THRESHOLDS
from bdprune.screening.run import THRESHOLD, screen, screen_many
