"""``rules.md``: every rule under which a scan reports a finding."""

from __future__ import annotations

from bdprune.registry import methods
from bdprune.verdict import ATLAS, RULES
from docs.markdown import NOTE, table

HEAD = f"""# Rules

{NOTE}

Each finding of a scan has the id of a rule (`rule_id`). A detector reports under its own rule, and several detectors
may share one. The scan itself reports under the other rules.
"""

END = f"""
A detector whose evidence is strong reports with the severity `high`, another detector with `medium`. A natural shortcut
(`BD200`) has the severity `low`: it does not count towards a backdoor. The message of a finding has the score, the
threshold, and whatever limits the finding.

Findings of a backdoor name the techniques of [MITRE ATLAS](https://atlas.mitre.org/) in `atlas`:
{", ".join(f"{id} ({name})" for id, name in ATLAS.items())}.

A detector of another package has the rule that it declares, by default `BD010`.
"""


def page() -> str:
    """The whole page."""
    reporters: dict[str, list[str]] = {rule.id: [] for rule in RULES}
    rules = {rule.id: rule for rule in RULES}
    for one in methods("detector"):
        if one.rule is not None:
            rules[one.rule.id] = one.rule
            reporters.setdefault(one.rule.id, []).append(f"[{one.name}](methods.md#{one.name}-{one.kind})")
    rows = [
        (f"`{id}`", f"`{rule.name}`", rule.help, ", ".join(reporters[id]) or "the scan")
        for id, rule in sorted(rules.items())
    ]
    return "\n".join([HEAD, *table(("id", "name", "meaning", "reported by"), rows), END])
