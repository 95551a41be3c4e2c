"""The result schema: strict, versioned, and free of numbers that JSON does not know."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.errors import DataError
from bdprune.record import (
    KINDS,
    MOST_PICTURE_BYTES,
    Attachment,
    Box,
    CoverageResult,
    Env,
    Evidence,
    Finding,
    PurifyResult,
    Result,
    ScoreResult,
    TriggerInfo,
    documents_from_json,
    finite,
    schema,
)

GOLDEN = Path(__file__).parent / "golden"

ENV = Env(
    tool="bdprune",
    version="0.1.0",
    torch="2.13.0",
    cuda=None,
    device="cpu",
    backend="native",
    threads=1,
    seed=0,
    python="3.11.7",
    platform="Linux",
)


def result(**changes: object) -> Result:
    base: dict[str, object] = {
        "started": "2026-11-20T22:49:13+00:00",
        "seconds": 1.5,
        "artifact": None,
        "model": None,
        "data": None,
        "env": ENV,
        "verdict": "clean",
        "risk": 0.25,
        "target_label": None,
    }
    return Result(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_equals_the_recorded_one(kind: str) -> None:
    """A change here breaks readers: raise SCHEMA_VERSION, then write the file again with `bdprune schema KIND`."""
    assert json.loads(json.dumps(schema(kind))) == json.loads((GOLDEN / f"{kind}.schema.json").read_text())


def test_the_top_level_has_the_documented_fields() -> None:
    names = {"schema_version", "verdict", "risk", "target_label", "artifact", "model", "detectors", "findings", "data"}
    written = json.loads(result().to_json())
    assert names | {"env", "seconds", "error"} <= written.keys()
    assert written["schema_version"] == "2" and written["kind"] == "scan"


def test_a_written_result_is_read_back_equal() -> None:
    detector = Evidence(detector="a", score=1.0, threshold=0.5, flagged=True, details={"votes": [1, 2]})
    finding = Finding(rule_id="BD030", severity="high", message="m", atlas=("AML.T0018.000",))
    before = result(verdict="backdoored", target_label=8, detectors=(detector,), findings=(finding,))
    assert Result.from_json(before.to_json()) == before
    assert Result.from_json(before.to_json(indent=None)) == before
    assert "\n" not in before.to_json(indent=None)


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "fine"},
        {"risk": 1.5},
        {"schema_version": "1.1"},
        {"kind": "purify"},
        {"surprise": 1},
        {"target_label": "8"},
        {"findings": [{"rule_id": "X1", "severity": "high", "message": "m"}]},
    ],
)
def test_invalid_fields_are_errors(change: dict[str, object]) -> None:
    altered = json.loads(result().to_json()) | change
    with pytest.raises(DataError, match=r"not a Result of schema 2:"):
        Result.from_json(json.dumps(altered))


def test_invalid_json_is_an_error() -> None:
    for text in ("", "{", b"\xff\xfe"):
        with pytest.raises(DataError):
            Result.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_finite_makes_strict_json_of_anything(value: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    cleaned = finite(value)
    assert json.loads(json.dumps(cleaned, allow_nan=False), parse_constant=refuse) == cleaned
    assert finite(cleaned) == cleaned


def test_non_finite_numbers_become_null_and_finite_ones_stay() -> None:
    assert finite({"a": [math.nan, 1.5, (math.inf, -math.inf)], 3: "NaN"}) == {
        "a": [None, 1.5, [None, None]],
        "3": "NaN",
    }


def test_objects_that_json_does_not_know_become_text() -> None:
    class Version(str):
        pass

    assert finite({Path("a"): Path("b"), "v": Version("2.13")}) == {"a": "b", "v": "2.13"}
    assert type(finite(Version("2.13"))) is str


def test_non_finite_numbers_in_a_result_are_null_in_its_json() -> None:
    detector = Evidence(detector="a", score=math.nan, threshold=math.inf, flagged=False, details={"x": [math.nan]})
    text = result(detectors=(detector,)).to_json()
    assert "NaN" not in text and "Infinity" not in text
    back = Result.from_json(text).detectors[0]
    assert back.score is None and back.threshold is None and back.details == {"x": [None]}


def test_a_document_is_read_only_as_its_own_kind() -> None:
    text = result().to_json()
    for kind in (PurifyResult, ScoreResult):
        with pytest.raises(DataError):
            kind.from_json(text)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        result().verdict = "clean"  # type: ignore[misc]


def test_every_kind_is_recognised_by_its_tag() -> None:
    text = result().to_json()
    assert isinstance(msgspec.json.decode(text, type=Result | PurifyResult | ScoreResult), Result)


@pytest.mark.parametrize("change", [{"name": "../up"}, {"name": "up\n"}, {"sha256": "../" + "0" * 61}, {"sha256": ""}])
def test_attachments_cannot_name_files_outside_their_folder(change: dict[str, str]) -> None:
    fields = {"name": "trigger", "media_type": "image/png", "sha256": "0" * 64, "bytes": 0}
    Attachment(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of an attachment"):
        Attachment(**{**fields, **change})  # type: ignore[arg-type]
    with pytest.raises(DataError):
        Attachment.from_json(json.dumps({**fields, **change}))


def test_evidence_is_converted_to_json_values() -> None:
    odd = Evidence(
        detector="a",
        score=math.nan,
        threshold=math.inf,
        flagged=False,
        label_scores=(math.nan, 0.5),
        seconds=math.inf,
        params={"path": Path("x")},
        details={"x": (math.nan,)},
    )
    tidy = odd.tidy()
    assert not odd.valid and (tidy.score, tidy.threshold, tidy.label_scores, tidy.seconds) == (
        None,
        None,
        (None, 0.5),
        None,
    )
    assert tidy.params == {"path": "x"} and tidy.details == {"x": [None]}
    assert Evidence.from_json(tidy.to_json()) == tidy and tidy.tidy() == tidy
    assert Evidence(detector="a", score=1.0, threshold=0.5, flagged=True).valid


PNG = b"\x89PNG\r\n\x1a\n"


def trigger(**changes: object) -> TriggerInfo:
    base: dict[str, object] = {"kind": "patch", "target_label": 8, "size": 9.0, "flip_rate": 0.97, "images": 250}
    return TriggerInfo(**(base | changes))  # type: ignore[arg-type]


def test_the_pictures_of_a_trigger_are_base64_in_json() -> None:
    one = trigger(pictures={"mask": PNG}, box=Box(x=28, y=28, width=3, height=3))
    evidence = Evidence(detector="a", score=1.0, threshold=0.5, flagged=True, triggers=(one,))
    before = result(detectors=(evidence.tidy(),))
    assert json.loads(before.to_json())["detectors"][0]["triggers"][0]["pictures"] == {"mask": "iVBORw0KGgo="}
    assert Result.from_json(before.to_json()) == before and before.detectors[0] == evidence


@pytest.mark.parametrize(
    "pictures",
    [
        {"../mask": PNG},
        {"mask\n": PNG},
        {"mask": b"<svg onload=alert(1)>"},
        {"mask": PNG + bytes(MOST_PICTURE_BYTES)},
        {str(part): PNG + bytes(MOST_PICTURE_BYTES // 8) for part in range(8)},
    ],
)
def test_pictures_of_a_trigger_are_few_small_pngs(pictures: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="of a trigger"):
        trigger(pictures=pictures)
    altered = json.loads(trigger().to_json()) | {
        "pictures": {name: base64.b64encode(one).decode() for name, one in pictures.items()}
    }
    with pytest.raises(DataError, match="of a trigger"):
        TriggerInfo.from_json(json.dumps(altered))


def test_documents_are_read_from_an_object_an_array_and_lines() -> None:
    one = CoverageResult(files=2, scanned=1)
    assert documents_from_json(one.to_json()) == [one]
    assert documents_from_json(f"[{one.to_json()}, {one.to_json()}]") == [one, one]
    assert documents_from_json(f"{one.to_json(indent=None)}\n{one.to_json(indent=None)}\n") == [one, one]
    assert documents_from_json("") == []
    for wrong in ("{", "[" * 100_000, b"\xff"):
        with pytest.raises(DataError, match=r"^The text does not hold results of bdprune \(schema 2\): "):
            documents_from_json(wrong)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("{}", "it has no field `kind`"),
        ('{"kind": "other"}', "its kind is 'other', not one of scan, purify, score, invert, inspect, screen, coverage"),
        ('{"kind": ["scan"]}', "its kind is "),
        ("[3]", "it has a value that is not an object"),
    ],
)
def test_the_error_names_the_source_and_what_is_wrong_with_its_kind(wrong: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        documents_from_json(wrong, "r.json")
    assert caught.value.message.startswith(f"r.json does not hold results of bdprune (schema 2): {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_describes_every_field(kind: str) -> None:
    parts = schema(kind)["$defs"]
    silent = [
        f"{name}.{field}"
        for name, part in parts.items()
        for field, form in part["properties"].items()
        if not form.get("description") and field != "kind"
    ]
    assert len(parts) > 1 and silent == []
    assert not any("Attributes:" in part["description"] for part in parts.values())
