"""A store like that of a scan of many models, made in seconds, without any scan."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdprune.record import (
    ArtifactInfo,
    Box,
    DataInfo,
    Env,
    ErrorInfo,
    Evidence,
    Finding,
    ModelInfo,
    Result,
    SanityInfo,
    TriggerInfo,
)
from bdprune.store import ScanKey, Store

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHITECTURES = ("resnet18_cifar", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "vit_b_16", "convnext_tiny")
VERDICTS = {"backdoored": 0.02, "suspicious": 0.03, "error": 0.01, "inconclusive": 0.04, "clean": 0.9}
RULES = {
    "backdoored": ("BD101", "critical", "Backdoor to label {label}: 2 independent kinds of evidence agree."),
    "suspicious": ("BD030", "medium", "bdprune.inversion finds a small trigger for label {label}: score {score}."),
    "inconclusive": ("BD000", "medium", "The model labels {share} % of 500 clean images correctly, which is too few."),
}
STEPS = [{"accuracy": 0.9, "votes": [64, 64]}, {"accuracy": 0.5, "votes": [120, 8]}]
ENV = Env(
    tool="bdprune",
    version="0.2.0",
    torch="2.13.0",
    cuda=None,
    device="cpu",
    backend="native",
    threads=1,
    seed=0,
    python="3.11",
    platform="Linux",
)
DATA = DataInfo(
    source="clean_images",
    count=500,
    classes=10,
    per_class=dict.fromkeys(range(10), 50),
    digest="sha256:" + "cd" * 32,
    class_names=CLASSES,
    clean_accuracy=0.934,
    sanity=SanityInfo(ok=True, message="Clean accuracy is 93.4 % on 500 images."),
)


def fill(path: Path, count: int, pictures: dict[str, bytes] | None = None, hostile: tuple[str, ...] = ()) -> Path:
    """Makes a store of ``count`` models.

    Args:
        path: of the store.
        count: number of models.
        pictures: of the triggers.
        hostile: texts that become the names of further models, of their architectures and of their findings.
    """
    with Store(path) as store:
        store.database._open_connection().execute("PRAGMA synchronous = OFF")  # nothing must survive a power cut
        for index, one in enumerate([*results(count, pictures or {}), *map(_hostile, hostile)]):
            assert one.artifact is not None
            store.save(ScanKey(f"{index:064x}", "", {"seed": 0}, "0.2.0"), one.artifact.path, [one])
    return path


def results(count: int, pictures: dict[str, bytes]) -> Iterator[Result]:
    """Results with all verdicts, mostly clean; the same for the same arguments."""
    draw = random.Random(0)
    names = list(VERDICTS)
    for index in range(count):
        verdict = names[index] if index < len(names) else draw.choices(names, list(VERDICTS.values()))[0]
        yield result(index, verdict, draw, pictures)


def result(index: int, verdict: Any, draw: random.Random, pictures: dict[str, bytes]) -> Result:
    """One result with this verdict."""
    arch, label = draw.choice(ARCHITECTURES), draw.randrange(10)
    named = label if verdict in ("backdoored", "suspicious") else None
    path = f"registry/team-{index % 37:02d}/{arch}/experiment-{index:05d}/checkpoint-best.safetensors"
    common: dict[str, Any] = {
        "started": f"2026-11-{1 + index % 28:02d}T10:{index % 60:02d}:00+00:00",
        "seconds": round(draw.uniform(2, 90), 3),
        "artifact": ArtifactInfo(path=path, format="safetensors", bytes=44_800_000, sha256=f"{index:064x}"),
        "env": ENV,
        "verdict": verdict,
        "target_label": named,
    }
    if verdict == "error":
        error = ErrorInfo(type="ArtifactError", message="The file ends early.", hint="Copy it again.")
        return Result(**common, model=None, data=None, risk=None, error=error)
    model = ModelInfo(arch=arch, parameters=11_173_962, num_classes=10, input_shape=(3, 32, 32), digest="2" * 64)
    evidence = tuple(_evidence(draw, named, pictures))
    risk = {"backdoored": 0.99, "suspicious": 0.7, "inconclusive": None, "clean": 0.04}[verdict]
    risk = None if risk is None else round(min(1.0, risk * draw.uniform(0.9, 1.01)), 6)
    return Result(
        **common, model=model, data=DATA, risk=risk, detectors=evidence, findings=_findings(verdict, label, draw)
    )


def _findings(verdict: str, label: int, draw: random.Random) -> tuple[Finding, ...]:
    if verdict not in RULES:
        return ()
    rule, severity, message = RULES[verdict]
    text = message.format(label=label, score=round(draw.uniform(2, 9), 3), share=round(draw.uniform(5, 40), 1))
    return (Finding(rule_id=rule, severity=severity, message=text),)  # type: ignore[arg-type]


def _evidence(draw: random.Random, label: int | None, pictures: dict[str, bytes]) -> Iterator[Evidence]:
    for name, threshold in (("lipschitz", 6.0), ("suspiciousness", 8.0), ("inversion", 1.7), ("unlearning", 0.09)):
        flagged = label is not None and name in ("inversion", "unlearning")
        score = threshold * (draw.uniform(1.5, 8) if flagged else draw.uniform(0.05, 0.95))
        trigger = TriggerInfo(
            kind="patch",
            target_label=label,
            size=9.4,
            flip_rate=0.97,
            images=250,
            box=Box(x=28, y=28, width=3, height=3),
            pictures=pictures,
        )
        yield Evidence(
            detector=f"bdprune.{name}",
            score=score,
            threshold=threshold,
            flagged=flagged,
            target_label=label if flagged else None,
            label_scores=(0.01, 0.9),
            seconds=draw.random(),
            details={"trajectory": STEPS},
            triggers=(trigger,) if flagged and name == "inversion" else (),
        )


def _hostile(text: str) -> Result:
    """A backdoored model with this text in every place that a file can fill."""
    finding = Finding(rule_id="BD101", severity="critical", message=text)
    artifact = ArtifactInfo(path=text, format=text, state_key=text, sets=(text, "other"))
    seen = Evidence(detector=text, score=2.0, threshold=1.0, flagged=True, remarks=(text,), error="")
    return Result(
        started=text,
        seconds=1.0,
        artifact=artifact,
        model=ModelInfo(arch=text, parameters=1, num_classes=10, input_shape=(3, 8, 8)),
        data=DataInfo(source=text, count=1, classes=1, per_class={0: 1}, digest=text, class_names=(text,) * 10),
        env=ENV,
        verdict="backdoored",
        risk=1.0,
        target_label=3,
        detectors=(seen,),
        findings=(finding,),
    )
