"""Writes docs/methods.md: the detectors and purifiers, as they describe themselves.

    python tools/generate_docs.py [FILE] [--check]

``--check`` writes nothing and exits with 1 where the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bdprune.cli.methods import needs
from bdprune.record import GIFTS, MethodInfo
from bdprune.registry import Kind, methods

FILE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """# Methods

<!-- Made by `python tools/generate_docs.py` from what the methods say of themselves. Do not edit. -->

The detectors and purifiers there are, in the order in which a scan runs them. `bdprune detectors` and
`bdprune purifiers` list them too, with those of other packages that are installed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if not args.check:
        args.file.write_text(text, encoding="utf-8")
    elif not args.file.is_file() or args.file.read_text(encoding="utf-8") != text:
        print(f"{args.file} is stale. Run: python tools/generate_docs.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole file."""
    parts = [HEAD, _section("Detectors", "detector"), _section("Purifiers", "purifier"), _gifts()]
    return "\n".join(parts)


def _section(title: str, kind: Kind) -> str:
    found = methods(kind)
    rows = [(f"[{one.name}](#{one.name}-{kind})", one.title, needs(one), one.cost, _label(one)) for one in found]
    table = _table(("name", "what it does", "needs", "cost", "target label"), rows)
    return "\n".join([f"## {title}\n", *table, "", *(_method(one) for one in found)])


def _method(one: MethodInfo) -> str:
    lines = [f"### {one.name} ({one.kind})", "", f"`{one.id}`: {one.title}.", ""]
    if one.paper:
        lines.append(f"- Paper: {one.paper}.")
    lines.append(f"- Gives: {', '.join(one.gives)}.")
    if one.rule:
        lines.append(f"- Findings: {one.rule.id} `{one.rule.name}`. {one.rule.help}")
        lines.append(f"- {_weight(one)}")
    if one.limits:
        lines.append(f"- Limits: {one.limits}")
    presets = [
        (f"`{name}`", _shown(_other(value, one.settings)) or "the default") for name, value in one.presets.items()
    ]
    settings = [(f"`{name}`", _shown(value)) for name, value in one.settings.items()]
    table = _table(("setting", "default"), settings) if settings else ["It has no settings."]
    return "\n".join(
        [
            *lines,
            "",
            *table,
            *(["", *_table(("preset", "sets, where it differs from the default"), presets)] if presets else []),
            "",
        ]
    )


def _weight(one: MethodInfo) -> str:
    decides = "decide the verdict" if one.decisive else "corroborate: alone they make a model suspicious"
    return f"Its findings {decides}.{' It takes stacks of models.' if one.stackable else ''}"


def _gifts() -> str:
    """Which method helps with what, as in Table 1 of the RNP paper."""
    text = "## Which method helps with what\n\nThe columns of Table 1 of the RNP paper (arXiv 2305.14876).\n"
    found = [*methods("detector"), *methods("purifier")]
    rows = [(f"{one.name} ({one.kind})", *("yes" if gift in one.gives else "–" for gift in GIFTS)) for one in found]
    return "\n".join([text, *_table(("method", *GIFTS), rows), ""])


def _label(one: MethodInfo) -> str:
    return "named" if one.label else "–"


def _shown(value: Any) -> str:
    """A setting as code; one that has settings of its own lists them."""
    if isinstance(value, dict):
        return ", ".join(f"`{key}={_code(item)}`" for key, item in value.items())
    return f"`{_code(value)}`"


def _other(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What of the settings of a preset is not the default."""
    found = {}
    for key, item in value.items():
        base = default.get(key)
        both = isinstance(item, dict) and isinstance(base, dict)
        if item != base:
            found[key] = _other(item, base) if both else item
    return found


def _code(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{key}={_code(item)}' for key, item in value.items())})"
    return json.dumps(value, ensure_ascii=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
