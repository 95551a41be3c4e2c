"""The rules that no detector owns: what a scan reports about itself, and about several detectors at once."""

from __future__ import annotations

from bdprune.record import Rule

NOT_JUDGED = Rule(
    id="BD000",
    name="not-judged",
    help="Something limits the verdict, or prevents one: the message says what.",
)
NOT_SCANNED = Rule(
    id="BD001",
    name="not-scanned",
    help="The file holds weights that were not scanned: the message names them.",
)
CONFIRMED = Rule(
    id="BD101",
    name="confirmed-backdoor",
    help="Two independent kinds of evidence name the same label.",
)
UNUSUAL = Rule(
    id="BD102",
    name="unusual-evidence",
    help="No evidence counts by itself, but the scores of all detectors are as a whole higher than on clean networks.",
)
NATURAL = Rule(
    id="BD200",
    name="natural-shortcut",
    help="A recovered trigger works, but it looks like features of its class, as also clean networks have them.",
)

ATLAS = {"AML.T0018.000": "Poison AI Model", "AML.T0043.004": "Insert Backdoor Trigger"}
"""The MITRE ATLAS techniques that a finding of a backdoor points to, by id."""

RULES: tuple[Rule, ...] = (NOT_JUDGED, NOT_SCANNED, CONFIRMED, UNUSUAL, NATURAL)
"""All of them; each detector has one of its own besides."""
