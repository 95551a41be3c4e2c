"""The forms of results in a notebook."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

import bdprune
from bdprune.record import (
    ArtifactInfo,
    Attempt,
    ErrorInfo,
    Evidence,
    Finding,
    InvertResult,
    PurifyResult,
    RepairCheck,
    Result,
    ScreenResult,
    TriggerCheck,
    TriggerInfo,
)
from bdprune.report import fragment as module
from bdprune.report import html_fragment

EVIL = "</style></table><script>alert(1)</script>\"'><svg onload=x> \u202e"
CHECK = RepairCheck(
    triggers=(
        TriggerCheck(
            name="patch to 8", flips_before=0.97, flips_after=0.02, score_before=9, score_after=1, reactivated=0
        ),
    ),
    lead_before=0.28,
    lead_after=0.05,
)
ATTEMPTS = (
    Attempt(method="clp", accuracy_after=0.9, left=("a trigger flips 40 %",), seconds=2.0),
    Attempt(method="rnp", accuracy_after=0.92, chosen=True, seconds=12.5),
)


class Reader(HTMLParser):
    """Tags and text; every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self._text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        if tag != "img":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self._text.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())


@pytest.fixture
def checked(repaired: PurifyResult) -> PurifyResult:
    """A repair by a method that tries several."""
    return msgspec.structs.replace(repaired, check=CHECK, outcome="repaired", attempts=ATTEMPTS)


@pytest.fixture
def screened() -> ScreenResult:
    return ScreenResult(
        version="1",
        started="2026-01-01T00:00:00+00:00",
        seconds=0.1,
        artifact=ArtifactInfo(path="models/net.pth"),
        outcome="look closer",
        reasons=("Label 3 stands out.",),
        threshold=6.0,
    )


def test_a_scan_has_verdict_evidence_and_pictures(triggered: Result) -> None:
    found = triggered._repr_html_()
    assert found == html_fragment(triggered) == bdprune.html_fragment(triggered)
    text = Reader(found).text
    for part in ("backdoored models/badnets.pth", "leads to label 8 (ship)", "risk 0.994", "BD101 critical", "0.981"):
        assert part in text
    assert "Trigger: patch, label 8 (ship), 3x3 pixels at (28, 28)" in text and found.count("data:image/png") == 4


def test_a_repair_has_before_and_after_and_what_was_tried(checked: PurifyResult) -> None:
    text = Reader(checked._repr_html_()).text
    for part in (
        "repaired models/badnets.pth",
        "bdprune.rnp: pruned.",
        "clean accuracy 93.0 % → 92.0 %",
        "patch to 8: flips 97.0 % → 2.0 %",
        "lead 0.28 → 0.05",
        "pruned 41 filters in 2 filter groups",
        "tried clp a trigger flips 40 %",
        "(chosen)",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"outcome": "unrepaired", "check": msgspec.structs.replace(CHECK, left=("a trigger",))}, "unrepaired"),
        ({"outcome": "unverified", "check": RepairCheck()}, "unverified"),
        ({"outcome": "unchecked"}, "changed, not checked"),
        ({"change": "nothing", "pruned": {}}, "unchanged"),
        ({"left": ("ema: too inaccurate",)}, "partly repaired"),
    ],
)
def test_the_outcomes_of_repairs(repaired: PurifyResult, changes: dict[str, Any], word: str) -> None:
    assert Reader(msgspec.structs.replace(repaired, **changes)._repr_html_()).text.startswith(f"{word} models")


def test_screens_inversions_and_errors(screened: ScreenResult, inverted: InvertResult, failed: Result) -> None:
    text = Reader(screened._repr_html_()).text
    assert text.startswith("look closer models/net.pth Label 3 stands out.") and "look-closer" in html_fragment(
        screened
    )
    found = inverted._repr_html_()
    assert "patch label 8 (ship) other labels 5.5 9.4" in Reader(found).text and found.count("data:image/png") == 4
    assert failed.error is not None
    text = Reader(failed._repr_html_()).text
    assert text.startswith("error") and failed.error.message in text and failed.error.hint in text


def test_records_without_a_form_have_none(scored: Any, clean: Result) -> None:
    for one in (scored, clean.env, clean.detectors[0]):
        assert not hasattr(one, "_repr_html_")


def test_untrusted_text_is_escaped(
    triggered: Result, checked: PurifyResult, screened: ScreenResult, patch: TriggerInfo
) -> None:
    artifact = ArtifactInfo(path=EVIL)
    seen = Evidence(detector=EVIL, score=2.0, threshold=1.0, flagged=True, triggers=(patch,))
    assert triggered.data is not None and triggered.model is not None
    scan = msgspec.structs.replace(
        triggered,
        artifact=artifact,
        detectors=(seen,),
        findings=(Finding(rule_id=EVIL, severity="high", message=EVIL),),
        data=msgspec.structs.replace(triggered.data, class_names=(EVIL,) * 10),
        model=msgspec.structs.replace(triggered.model, arch=EVIL),
    )
    error = msgspec.structs.replace(scan, verdict="error", error=ErrorInfo(type=EVIL, message=EVIL, hint=EVIL))
    attempts = (Attempt(method=EVIL, accuracy_after=None, rejected=EVIL),)
    check = msgspec.structs.replace(CHECK, left=(EVIL,))
    repair = msgspec.structs.replace(
        checked, artifact=artifact, method=EVIL, selection=EVIL, attempts=attempts, check=check, outcome="unrepaired"
    )
    screen = msgspec.structs.replace(screened, artifact=artifact, reasons=(EVIL,), unscreened=(EVIL,))
    for one in (scan, error, repair, screen):
        found = html_fragment(one)
        assert "<script" not in found and "\u202e" not in found and "onload=x>" not in found
        reader = Reader(found)
        assert "script" not in reader.tags and "svg" not in reader.tags and "onload" not in reader.names


def test_fragments_stay_small(triggered: Result, monkeypatch: pytest.MonkeyPatch, patch: TriggerInfo) -> None:
    monkeypatch.setattr(module, "MOST_PICTURE_BYTES", sum(map(len, patch.pictures.values())) * 2)
    seen = msgspec.structs.replace(triggered.detectors[-1], triggers=(patch,) * 100)
    long = "a" * 1_000_000
    result = msgspec.structs.replace(
        triggered,
        artifact=ArtifactInfo(path=long),
        detectors=(seen,) * 50,
        findings=(Finding(rule_id="BD101", severity="high", message=long),) * 100,
    )
    found = html_fragment(result)
    assert found.count("data:image/png") == 8 and len(found) < 200_000


def test_the_text_form_is_that_of_the_record(clean: Result) -> None:
    assert repr(clean).startswith("Result(schema_version='2', started=") and repr(clean) == str(clean)


def test_a_record_that_comes_from_a_file_has_the_form_without_torch(clean: Result, tmp_path: Any) -> None:
    (tmp_path / "result.json").write_text(clean.to_json())
    code = f"""
import sys
from bdprune.record import Result
found = Result.from_json(open({str(tmp_path / "result.json")!r}).read())._repr_html_()
print("models/clean.pth" in found, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr
