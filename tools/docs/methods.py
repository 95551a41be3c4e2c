"""``methods.md``: the detectors and purifiers, as they describe themselves."""

from __future__ import annotations

import json
from typing import Any

from bdprune.cli.methods import BY_NAME, needs
from bdprune.record import GIFTS, SIGNS, STRONG, MethodInfo
from bdprune.registry import Kind, methods
from docs.markdown import NOTE, table

HEAD = f"""# Methods

{NOTE}

These are the detectors and purifiers of bdprune, as they describe themselves. A scan runs the detectors in this order:
those of the budget `fast` first, and among them the cheap ones. Those marked "by name" run only if `--detectors` names
them.
`bdprune detectors` and `bdprune purifiers` list them too, and the methods of other packages that are installed.
"""


def page() -> str:
    """The whole file."""
    parts = [HEAD, _section("Detectors", "detector"), _section("Purifiers", "purifier"), _gifts()]
    return "\n".join(parts)


def _section(title: str, kind: Kind) -> str:
    found = methods(kind)
    own = ("evidence", "budget") if kind == "detector" else ()
    rows = [
        (
            *(f"[{one.name}](#{one.name}-{kind})", one.title, needs(one), one.cost, _label(one)),
            *((f"`{one.sign}`", f"`{one.level}`" if one.level else BY_NAME) if own else ()),
        )
        for one in found
    ]
    lines = table(("name", "what it does", "needs", "cost", "target label", *own), rows)
    signs = ["", *_signs()] if own else []
    return "\n".join([f"## {title}\n", *lines, *signs, "", *(_method(one) for one in found)])


def _signs() -> list[str]:
    """The kinds of evidence."""
    rows = [(f"`{sign}`", meaning, "yes" if sign in STRONG else "–") for sign, meaning in SIGNS.items()]
    text = "Two kinds of strong evidence that name the same label make a model `backdoored`."
    return [text, "", *table(("evidence", "what was found", "strong"), rows)]


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
    defaults = table(("setting", "default"), settings) if settings else ["It has no settings."]
    return "\n".join(
        [
            *lines,
            "",
            *defaults,
            *(["", *table(("preset", "sets, where it differs from the default"), presets)] if presets else []),
            "",
        ]
    )


def _weight(one: MethodInfo) -> str:
    strong = "strong evidence" if one.sign in STRONG else "evidence that only makes a model suspicious"
    stacks = " It takes stacks of models." if one.stackable else ""
    runs = f"at the budget `{one.level}` and above" if one.level else "only if it is named in `--detectors`"
    return f"Its findings are {strong}: `{one.sign}`. It runs {runs}.{stacks}"


def _gifts() -> str:
    """Which method helps with what, as in Table 1 of the RNP paper."""
    text = "## Which method helps with what\n\nThe columns of Table 1 of the RNP paper (arXiv 2305.14876).\n"
    found = [*methods("detector"), *methods("purifier")]
    rows = [(f"{one.name} ({one.kind})", *("yes" if gift in one.gives else "–" for gift in GIFTS)) for one in found]
    return "\n".join([text, *table(("method", *GIFTS), rows), ""])


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
