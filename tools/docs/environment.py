"""``environment.md``: every environment variable."""

from __future__ import annotations

from bdprune.environment import VARIABLES, Variable
from bdprune.ops.tuner import QUESTIONS
from docs.markdown import NOTE, table

HEAD = f"""# Environment variables

{NOTE}

No variable has to be set.
"""

SECTIONS = {
    "run": ("While bdprune runs", "A variable that is set to an empty text counts as unset.\n"),
    "build": ("While bdprune is built", "`pip install .` and `make env` read these.\n"),
    "test": ("In the tests", "`make test` reads these.\n"),
}

COLUMNS = ("name", "values", "default", "meaning")

PINS = """`BDPRUNE_TUNE` takes a pin for each of these choices. [Run on a GPU](../how-to/run-on-a-gpu.md) says more.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for use, (title, text) in SECTIONS.items():
        rows = [_row(one) for one in VARIABLES if one.use == use]
        parts += [
            f"## {title}\n",
            *([text] if text else []),
            *table(COLUMNS, rows),
            "",
        ]
        if use == "run":
            variants = [(f"`{name}`", ", ".join(f"`{one}`" for one in ways)) for name, ways in QUESTIONS.items()]
            parts += [PINS, *table(("choice", "variants"), variants), ""]
    return "\n".join(parts)


def _row(one: Variable) -> tuple[str, ...]:
    return (f"`{one.name}`", one.values, f"`{one.default}`" if one.default else "–", one.meaning)
