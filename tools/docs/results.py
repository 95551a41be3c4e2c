"""The parts of ``results.md`` that the code knows: verdicts, fields, exit codes. The rest is written by hand."""

from __future__ import annotations

import re
from typing import Any

from bdprune.cli.exit_codes import CODES, ORDER
from bdprune.record import KINDS, VERDICTS, schema
from docs.markdown import prose, table

_REGION = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(\n<!-- end -->)", re.S)


def filled(text: str) -> str:
    """The page with its generated parts made anew: all between ``<!-- generated: NAME -->`` and ``<!-- end -->``."""
    parts = {"verdicts": _verdicts, "exit-codes": _exit_codes, "fields": _fields}
    return _REGION.sub(lambda region: f"{region[1]}\n{parts[region['name']]()}\n{region[3]}", text)


def _verdicts() -> str:
    return "\n".join(table(("verdict", "meaning"), [(f"`{one}`", meaning) for one, meaning in VERDICTS.items()]))


def _exit_codes() -> str:
    rows = [(str(code), f"{prose(meaning[0].upper() + meaning[1:])}.") for code, meaning in CODES.items()]
    return "\n".join([*table(("code", "meaning"), rows), "", ORDER])


def _fields() -> str:
    """Every record of the schemas: the documents first, then their parts."""
    schemas = {kind: schema(kind) for kind in KINDS}
    tops = {one["$ref"].rpartition("/")[2]: kind for kind, one in schemas.items()}
    records: dict[str, Any] = {name: schemas[kind]["$defs"][name] for name, kind in tops.items()}
    for one in schemas.values():
        records |= {name: part for name, part in one["$defs"].items() if name not in records}
    return "\n\n".join(_record(name, part, tops.get(name)) for name, part in records.items())


def _record(name: str, part: dict[str, Any], kind: str | None) -> str:
    description = part["description"].replace("``", "`").strip()
    kinds = [] if kind is None else [f"A document of kind `{kind}`.", ""]
    required = set(part.get("required", ()))
    rows = []
    for field, form in part["properties"].items():
        cells = [f"`{field}`", _type(form), "–" if field in required else _default(form)]
        rows.append([*cells, _sentence(form.get("description", "The kind of document."))])
    head = ("field", "type", "default", "meaning")
    return "\n".join([f"### {name}", "", *kinds, description, "", *table(head, rows)])


def _sentence(text: str) -> str:
    text = text.replace("``", "`")
    return text[0].upper() + text[1:]


def _default(form: dict[str, Any]) -> str:
    default = form.get("default")
    return "null" if default is None else "empty" if default in ([], {}, (), "") else f"`{default}`".lower()


def _type(form: dict[str, Any]) -> str:
    """A JSON Schema in words."""
    if "$ref" in form:
        name = form["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in form:
        return " or ".join(_type(one) for one in form["anyOf"])
    if "enum" in form:
        return ", ".join(f"`{one}`" for one in form["enum"])
    if "const" in form:
        return f"`{form['const']}`"
    kind = form.get("type")
    if kind == "array":
        return _array(form)
    if kind == "object":
        return f"object of {_plural(form['additionalProperties'])}" if form.get("additionalProperties") else "object"
    return "any" if kind is None else f"{kind}{_range(form)}"


def _array(form: dict[str, Any]) -> str:
    if "prefixItems" in form:
        return f"array of {len(form['prefixItems'])} {_plural(form['prefixItems'][0])}"
    return f"array of {_plural(form['items'])}" if form.get("items") else "array"


def _plural(form: Any) -> str:
    name = _type(form) if isinstance(form, dict) else "any"
    return name if name == "any" or name.endswith(")") or " " in name else f"{name}s"


def _range(form: dict[str, Any]) -> str:
    low, high = form.get("minimum"), form.get("maximum")
    if low is not None and high is not None:
        return f" in [{low}, {high}]"
    return f" ≥ {low}" if low is not None else ""
