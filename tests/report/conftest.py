"""Results like those of a scan, a repair and a scoring run."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bdprune.files import encode_png
from bdprune.record import (
    ArtifactInfo,
    Attachment,
    Box,
    CompactInfo,
    CoverageResult,
    CurveInfo,
    DataInfo,
    Document,
    Env,
    ErrorInfo,
    Evidence,
    FilterScore,
    Finding,
    Histogram,
    InvertResult,
    LayerScores,
    ModelInfo,
    OutputInfo,
    PassedOver,
    PurifyResult,
    Result,
    SanityInfo,
    ScoreResult,
    TriggerInfo,
)

MASKS = Attachment(
    name="filter_scores", media_type="application/safetensors", sha256="12" * 32, bytes=9_600, file="scores.safetensors"
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _common(path: str) -> dict[str, object]:
    return {
        "started": "2026-11-20T22:49:13+00:00",
        "seconds": 12.5,
        "artifact": ArtifactInfo(
            path=path, format="torch-zip", bytes=11_173_962, sha256="ab" * 32, state_key="net", prefix=""
        ),
        "model": ModelInfo(
            arch="resnet18_cifar",
            parameters=2_797_610,
            num_classes=10,
            input_shape=(3, 32, 32),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            filter_groups=20,
            filters=2400,
        ),
        "data": DataInfo(
            source="clean/cifar10",
            count=500,
            classes=10,
            per_class=dict.fromkeys(range(10), 50),
            digest="sha256:" + "cd" * 32,
            class_names=CIFAR10,
            clean_accuracy=0.934,
            sanity=SanityInfo(ok=True, message="Clean accuracy is 93.4 % on 500 images."),
        ),
        "env": Env(
            tool="bdprune",
            version="0.1.0",
            torch="2.13.0+cpu",
            cuda=None,
            device="cpu",
            backend="native",
            threads=2,
            seed=0,
            python="3.11.7",
            platform="Linux",
        ),
    }


def _unlearning(flagged: bool) -> Evidence:
    steps = 24
    accuracy = [max(0.1, 0.94 - 0.036 * step) for step in range(steps)]
    top = [int(128 * (0.1 + (0.9 if flagged else 0.3) * step / steps)) for step in range(steps)]
    return Evidence(
        detector="bdprune.unlearning",
        score=0.981 if flagged else 0.34,
        threshold=0.6,
        flagged=flagged,
        target_label=8 if flagged else None,
        seconds=9.25,
        params={"lr": 0.01, "max_epochs": 20},
        details={
            "lr": 0.01,
            "stopped": True,
            "trajectory": [
                {"accuracy": share, "votes": [(128 - best) // 9] * 8 + [best, (128 - best) // 9]}
                for share, best in zip(accuracy, top, strict=True)
            ],
            "flip_shares": [0.01] * 8 + [0.98 if flagged else 0.34, 0.0],
        },
        label_scores=(*[0.01] * 8, 0.98 if flagged else 0.34, 0.0),
        remarks=("The lead is taken over 1 order of 500 images.",),
    )


def _lipschitz(flagged: bool) -> Evidence:
    peaks = [2.1 + (index * 37 % 11) / 8 for index in range(20)]
    if flagged:
        peaks[17] = 9.4
    layers = [
        {"layer": f"layer{1 + index // 5}.{index % 5}.conv1", "max_z": peak, "filter": index}
        for index, peak in enumerate(peaks)
    ]
    return Evidence(
        detector="bdprune.lipschitz",
        score=max(peaks),
        threshold=5.0,
        flagged=flagged,
        seconds=0.031,
        details={"layers": layers},
        attachments=(MASKS,),
    )


@pytest.fixture
def backdoored() -> Result:
    return Result(
        **_common("models/badnets.pth"),
        verdict="backdoored",
        risk=0.994,
        target_label=8,
        detectors=(_unlearning(True), _lipschitz(True)),
        findings=(
            Finding(
                rule_id="BD101",
                severity="critical",
                message="Backdoor to label 8: 2 detectors see it independently.",
                atlas=("AML.T0018.000", "AML.T0043.004"),
            ),
        ),
    )


def picture(*shape: int) -> bytes:
    """A PNG of noise ``[h, w]`` or ``[h, w, 3]``."""
    return encode_png(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


PICTURES = {"mask": picture(32, 32), "pattern": picture(32, 32, 3)}
PICTURES |= {"stamped": picture(32, 98, 3), "difference": picture(32, 98, 3)}


@pytest.fixture
def patch() -> TriggerInfo:
    """A recovered trigger with pictures."""
    return TriggerInfo(
        kind="patch",
        target_label=8,
        size=9.4,
        flip_rate=0.97,
        images=250,
        box=Box(x=28, y=28, width=3, height=3),
        attachment="trigger-8",
        file="trigger-8-1212.safetensors",
        pictures=PICTURES,
    )


@pytest.fixture
def untargeted() -> TriggerInfo:
    """A recovered trigger without pictures, for the images of two labels."""
    return TriggerInfo(kind="additive", target_label=None, source_labels=(3, 5), size=40.0, flip_rate=None, images=0)


@pytest.fixture
def triggered(backdoored: Result, patch: TriggerInfo, untargeted: TriggerInfo) -> Result:
    """A scan with recovered triggers, of a backdoor with several targets."""
    found = Evidence(
        detector="bdprune.inversion",
        score=0.97,
        threshold=0.5,
        flagged=True,
        targets=tuple(range(10)),
        sources=(3, 5),
        triggers=(patch, untargeted),
    )
    return msgspec.structs.replace(backdoored, detectors=(*backdoored.detectors, found))


@pytest.fixture
def clean() -> Result:
    return Result(
        **_common("models/clean.pth"),
        verdict="clean",
        risk=0.093,
        target_label=None,
        detectors=(_unlearning(False), _lipschitz(False)),
    )


@pytest.fixture
def inconclusive() -> Result:
    finding = Finding(rule_id="BD000", severity="medium", message="No clean data was given.")
    common = _common("models/unknown.pth") | {"data": None}
    return Result(**common, verdict="inconclusive", risk=None, target_label=None, findings=(finding,))


@pytest.fixture
def failed() -> Result:
    common = _common("models/broken.pth") | {"model": None, "data": None}
    common["artifact"] = ArtifactInfo(path="models/broken.pth", bytes=117)
    error = ErrorInfo(type="ArtifactError", message="The archive is cut off.", hint="Download it again.")
    return Result(**common, verdict="error", risk=None, target_label=None, error=error)


@pytest.fixture
def repaired() -> PurifyResult:
    edges = tuple(index / 20 for index in range(21))
    return PurifyResult(
        **_common("models/badnets.pth"),
        method="bdprune.rnp",
        outcome="repaired",
        accuracy_before=0.93,
        accuracy_after=0.92,
        threshold=0.35,
        change="pruned",
        selection="largest with a drop of at most 2 points on held-out clean data",
        filters=2400,
        filters_pruned=41,
        pruned={"layer4.1.conv2": tuple(range(30)), "layer4.0.conv1": tuple(range(11))},
        target_label=8,
        curve=tuple(
            CurveInfo(
                threshold=index / 20,
                clean_accuracy=0.93 - 0.002 * index if index < 9 else max(0.1, 0.93 - 0.09 * (index - 7)),
                filters_pruned=6 * index,
            )
            for index in range(1, 16)
        ),
        masks=Histogram(
            edges=edges,
            counts=(22, 9, 6, 3, 1, 0, 0, 2, 1, 4, 5, 3, 6, 8, 9, 12, 20, 41, 100, 2148),
            pruned=(22, 9, 6, 3, 1, *[0] * 15),
        ),
        phases={"unlearn": 4.0, "recover": 6.5, "sweep": 2.0},
        params={"max_drop": 0.02},
        output=OutputInfo(path="repaired.pth", format="torch-zip", bytes=11_173_990, sha256="ef" * 32),
    )


@pytest.fixture
def compacted(repaired: PurifyResult) -> PurifyResult:
    """The same repair with the pruned filters removed."""
    info = CompactInfo(
        filters_removed=30,
        parameters_before=176_402,
        parameters_after=124_662,
        flops_before=17_745_152,
        flops_after=12_545_292,
        ms_before=1.75,
        ms_after=1.5,
        difference=4.5e-7,
        whole=("layer4.0.conv1: 11 of 11 pruned filters stay: the logits would change",),
    )
    assert repaired.output
    output = msgspec.structs.replace(repaired.output, description="repaired.pth.arch.json")
    return msgspec.structs.replace(repaired, compact=info, output=output)


@pytest.fixture
def retrained(repaired: PurifyResult) -> PurifyResult:
    """The result of a method that only trains: no threshold, masks or pruned filters."""
    return msgspec.structs.replace(
        repaired,
        method="x.fine_tuning",
        change="retrained",
        selection="after the last of 10 epochs",
        threshold=None,
        filters=0,
        filters_pruned=0,
        pruned={},
        target_label=None,
        curve=(),
        masks=None,
        phases={"fine_tune": 30.0},
        attachments=(msgspec.structs.replace(MASKS, name="teacher", file=""),),
    )


@pytest.fixture
def coverage() -> CoverageResult:
    """Of five files, one that may hold weights and two others were not scanned."""
    passed = (
        PassedOver(reason="ONNX", may_hold_weights=True, count=1, paths=("models/net.onnx",)),
        PassedOver(reason="text", may_hold_weights=False, count=2, paths=("models/a.txt", "models/b.txt")),
    )
    return CoverageResult(files=5, scanned=2, passed_over=passed)


@pytest.fixture
def scored() -> ScoreResult:
    layers = tuple(
        LayerScores(layer=f"layer{index}.conv1", filters=64, mean=1.0, std=0.2, max=1.4 + index / 10, max_z=2.0 + index)
        for index in range(6)
    )
    top = (FilterScore(layer="layer5.conv1", filter=17, score=1.9, z=7.0),)
    return ScoreResult(**_common("models/badnets.pth") | {"data": None}, method="lipschitz", layers=layers, top=top)


@pytest.fixture
def inverted(patch: TriggerInfo, untargeted: TriggerInfo) -> InvertResult:
    """Recovered triggers, one of them with pictures."""
    return InvertResult(
        **_common("models/badnets.pth"),
        triggers=(patch, untargeted),
        smallest=(5.5, None),
        skipped=("patch for label 3",),
        complete=False,
        folder="triggers",
        params={"lr": 0.3},
    )


@pytest.fixture
def everything(
    triggered: Result,
    repaired: PurifyResult,
    clean: Result,
    inconclusive: Result,
    failed: Result,
    scored: ScoreResult,
    inverted: InvertResult,
) -> list[Document]:
    """One document of every kind and verdict."""
    return [triggered, repaired, clean, inconclusive, failed, scored, inverted]
