from bdprune.verdict.judgement import judge
from bdprune.verdict.rules import CONFIRMED, NOT_JUDGED, NOT_SCANNED, RULES
