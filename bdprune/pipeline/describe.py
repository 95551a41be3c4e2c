"""Builds the records of a result from models, clean data and errors."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import bdprune
from bdprune.analysis import Sanity
from bdprune.data import CleanData
from bdprune.errors import BdpruneError, first_line
from bdprune.files import join_path
from bdprune.hub import HubFile, is_hub_name
from bdprune.model import Model
from bdprune.ops import backend, device_name
from bdprune.record import (
    ArtifactInfo,
    DataInfo,
    Env,
    ErrorInfo,
    ModelInfo,
    SanityInfo,
    WeightCoverage,
)


def artifact_info(model: Model) -> ArtifactInfo | None:
    """The model's file; None for a model in memory."""
    artifact = model.artifact
    if artifact is None:
        return None
    return ArtifactInfo(
        path=str(artifact.path),
        format=artifact.format,
        bytes=artifact.bytes,
        sha256=artifact.sha256,
        state_key=artifact.state_key,
        prefix=artifact.prefix,
        sets=artifact.sets,
    )


def weight_coverage(model: Model) -> WeightCoverage | None:
    """Which weights of the file were scanned; None for a model in memory."""
    artifact = model.artifact
    if artifact is None:
        return None
    return WeightCoverage(
        scanned=sum(value.numel() for value in model.network.state_dict().values() if value.is_floating_point()),
        unscanned=artifact.unscanned,
        same=tuple(map(join_path, artifact.places[1:])),
        kept=artifact.kept,
        left_out=artifact.left_out,
    )


def unread_artifact(path: str | os.PathLike[str]) -> ArtifactInfo:
    """The known facts about a file that could not be loaded."""
    if is_hub_name(path) or isinstance(path, HubFile):
        return ArtifactInfo(path=str(path))
    path = Path(path)
    return ArtifactInfo(path=str(path), bytes=os.path.getsize(path) if os.path.isfile(path) else None)


def model_info(model: Model, digest: str = "") -> ModelInfo:
    """The recognised model."""
    return ModelInfo(
        arch=model.arch,
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        num_classes=model.num_classes,
        input_shape=model.input_shape,
        mean=model.normalization.mean,
        std=model.normalization.std,
        filter_groups=len(model.groups),
        filters=sum(group.num_filters for group in model.groups),
        digest=digest,
    )


def data_info(data: CleanData, sanity: Sanity | None = None) -> DataInfo:
    """The clean data, and the model's accuracy on them."""
    return DataInfo(
        source=data.source,
        count=len(data),
        classes=len(data.class_counts),
        per_class=data.class_counts,
        digest=data.digest,
        class_names=data.class_names,
        notes=data.notes,
        passed_over=dict(data.passed_over),
        clean_accuracy=sanity.accuracy if sanity else None,
        sanity=_sanity_info(sanity) if sanity else None,
    )


def _sanity_info(sanity: Sanity) -> SanityInfo:
    return SanityInfo(
        ok=sanity.ok,
        message=sanity.message,
        hint=sanity.suggestion,
        fits=sanity.fits,
        class_map=dict(sorted(sanity.class_map.items())),
    )


def env(device: torch.device, seed: int) -> Env:
    """The environment of the run, as far as it may change the numbers."""
    return Env(
        tool="bdprune",
        version=bdprune.__version__,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        device=f"{device} ({device_name(device)})" if device.type == "cuda" else str(device),
        backend=backend(),
        threads=torch.get_num_threads(),
        seed=seed,
        python=platform.python_version(),
        platform=platform.platform(),
    )


def error_info(error: Exception) -> ErrorInfo:
    """Class, message and hint of an error; an error of any other class is a bug, and its hint asks for a report."""
    if isinstance(error, BdpruneError):
        return ErrorInfo(type=type(error).__name__, message=error.message, hint=error.hint)
    message = f"Unexpected {type(error).__name__}: {first_line(error)}"
    return ErrorInfo(
        type=type(error).__name__, message=message, hint="Please report it with the output of `bdprune --verbose`."
    )
