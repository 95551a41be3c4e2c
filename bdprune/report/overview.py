"""A page over many scans: totals, what was found, and a table to search, sort and filter, in one file.

The page has one script and one style sheet, both inline; its policy allows them by their hashes and nothing else. The
rows are JSON in the page. Without JavaScript, the page shows the most serious rows as a plain table.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
from markupsafe import Markup

from bdprune.record import ATTENTION, Evidence, Result, Severity, TriggerInfo
from bdprune.report.rendering import encodable, environment
from bdprune.report.rows import Row, row_of, rules_of
from bdprune.report.writers.text import plain

MOST_DETAILS = 200
"""Models whose findings and triggers are in the page; of the others, the table has the main ones."""
MOST_PLAIN_ROWS = 300
"""Rows of the table without JavaScript."""
MOST_PICTURE_TEXT = 1_500_000
"""Characters of all pictures in the page."""

_PICTURES = ("mask", "pattern", "stamped")
_MOST_TRIGGERS, _MOST_FINDINGS, _MOST_RULES = 2, 20, 40
_SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass
class Found:
    """A rule or a kind of error: how many models it applies to, and an example."""

    rule: str
    severity: Severity | None
    example: str
    models: int = 0


@dataclass(frozen=True)
class Detail:
    """One model at length. ``command`` shows all of it; empty if a shell cannot take the name as it is printed."""

    row: Row
    result: Result
    command: str


class Overview:
    """Collects scans one by one. In memory stay a short row of each, and the details of the most serious."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._details: list[Detail] = []
        self._found: dict[str, Found] = {}
        self._versions: Counter[str] = Counter()
        self._texts: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, result: Result, file: str, store: str) -> None:
        """Adds a model.

        Args:
            result: of its latest scan.
            file: its name in the store.
            store: name of the store.
        """
        row = Row(*(self._once(value) for value in row_of(result, file, store)))
        self._rows.append(row)
        self._versions[plain(result.env.version)] += 1
        self._count(result)
        if result.verdict != "clean":
            self._details.append(Detail(row, _slim(result), _command(store, file)))
            if len(self._details) >= 2 * MOST_DETAILS:
                self._details = self._most_serious()

    def page(self) -> str:
        """The page."""
        rows = sorted(self._rows, key=lambda row: row.rank)
        totals = Counter(row.verdict for row in rows)
        stores = list(dict.fromkeys(row.store for row in rows))
        places: dict[int, int] = {id(one.row): place for place, one in enumerate(self._most_serious(), 1)}
        style, script = _style(), _script()
        page = environment().get_template("overview.html.j2")
        return encodable(
            page.render(
                title=_count_of(len(rows)),
                policy=_policy(style, script),
                style=Markup(style),
                script=Markup(script),
                data=Markup(_safe_json(_data(rows, places, stores))),
                when=self._when(rows),
                stores=stores,
                totals=[(verdict, totals[verdict]) for verdict in ATTENTION],
                rows=rows[:MOST_PLAIN_ROWS],
                count=len(rows),
                places=[places.get(id(row), 0) for row in rows[:MOST_PLAIN_ROWS]],
                found=self._ranked_rules(),
                details=list(_with_pictures(self._most_serious())),
            )
        )

    def _once(self, value: Any) -> Any:
        """The value; equal texts are in memory once."""
        return self._texts.setdefault(value, value) if isinstance(value, str) else value

    def _count(self, result: Result) -> None:
        for rule in rules_of(result):
            finding = next((one for one in result.findings if one.rule_id == rule), None)
            example = finding.message if finding else result.error.message if result.error else ""
            severity = finding.severity if finding else None
            self._found.setdefault(rule, Found(rule, severity, example)).models += 1

    def _most_serious(self) -> list[Detail]:
        return sorted(self._details, key=lambda one: one.row.rank)[:MOST_DETAILS]

    def _ranked_rules(self) -> list[Found]:
        def rank(one: Found) -> tuple[int, int, str]:
            return -(_SEVERITIES.index(one.severity) if one.severity else -1), -one.models, one.rule

        return sorted(self._found.values(), key=rank)[:_MOST_RULES]

    def _when(self, rows: list[Row]) -> str:
        days = sorted({row.started for row in rows} - {"–"})
        span = dict.fromkeys(days[:1] + days[-1:])
        return f"{', '.join(sorted(self._versions))} · scans of {' to '.join(span) or 'unknown dates'}"


def _slim(result: Result) -> Result:
    """The result with only what the page shows."""
    detectors = tuple(_slim_evidence(one) for one in result.detectors)
    return msgspec.structs.replace(result, detectors=detectors, findings=result.findings[:_MOST_FINDINGS])


def _slim_evidence(one: Evidence) -> Evidence:
    triggers = one.triggers[:_MOST_TRIGGERS] if one.flagged else ()
    dropped: dict[str, Any] = {"label_scores": (), "remarks": (), "params": {}, "details": {}, "attachments": ()}
    return msgspec.structs.replace(one, triggers=triggers, **dropped)


def _with_pictures(details: list[Detail]) -> Iterator[tuple[Detail, list[tuple[TriggerInfo, dict[str, bytes]]]]]:
    """The details with their triggers, and those pictures that the size of the page leaves room for."""
    left = MOST_PICTURE_TEXT
    for detail in details:
        shown = []
        for one in (trigger for seen in detail.result.detectors for trigger in seen.triggers):
            pictures = {name: one.pictures[name] for name in _PICTURES if name in one.pictures}
            size = sum(4 * (len(content) // 3 + 1) for content in pictures.values())
            pictures = pictures if size <= left else {}
            left -= size if pictures else 0
            shown.append((one, pictures))
        yield detail, shown


def _command(store: str, file: str) -> str:
    """The command that shows a model; empty if the name has characters that a page does not show."""
    if plain(file) != file or plain(store) != store or len(file) > 4096:
        return ""
    apart = ["--"] if file.startswith("-") or store.startswith("-") else []
    return shlex.join(["bdprune", "show", *apart, store, file])


def _data(rows: list[Row], places: dict[int, int], stores: list[str]) -> dict[str, Any]:
    """The rows for the script, one list a row. Texts are indices of ``texts``."""
    texts: dict[str, int] = {}

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    table = [
        [
            ATTENTION.index(row.verdict),
            row.file,
            row.risk,
            *(index(one) for one in (row.label, row.why, row.scores, row.trigger, row.arch, row.started, row.rules)),
            row.seconds,
            stores.index(row.store),
            row.weights,
            places.get(id(row), 0),
        ]
        for row in rows
    ]
    return {"verdicts": list(ATTENTION), "stores": stores, "texts": list(texts), "rows": table}


def _safe_json(value: Any) -> str:
    """JSON that may stand in an element ``script``: no character ends the element or starts a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escapes = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}
    return text.translate(escapes)


def _style() -> str:
    made = environment()
    return "\n".join(made.get_template(name).render() for name in ("style.css.j2", "overview.css.j2")).strip()


def _script() -> str:
    made = environment()
    assert made.loader is not None
    return made.loader.get_source(made, "overview.js")[0].strip()


def _policy(style: str, script: str) -> str:
    """What the page may do: its own script and styles, and pictures inside of it."""
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _count_of(models: int) -> str:
    return f"{models:,} model{'' if models == 1 else 's'}"
