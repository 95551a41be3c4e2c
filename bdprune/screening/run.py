"""Screens checkpoints with NumPy and the torch-free core: scores from the weights alone; torch is never imported.

For services that receive many checkpoints and do not ship torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

import bdprune
from bdprune.errors import ArtifactError, BdpruneError, StoreError, UnsupportedError, first_line
from bdprune.files import StoredCheckpoint, StoredTensor, open_stored
from bdprune.hub import is_hub_name, one_file
from bdprune.record import ArtifactInfo, ErrorInfo, HeadScreen, LayerScreen, ScreenResult
from bdprune.screening.head import find_heads, screen_head
from bdprune.screening.pairs import norms_of_convolutions
from bdprune.screening.scores import filter_scores, norm_gain, z_scores

THRESHOLD = 6.0
"""Largest z-score of a filter within its layer that is not flagged; that of the detector ``lipschitz``."""


Recall = Callable[[str], ScreenResult | None]
"""Gives the screen of the file with a SHA-256 if there is one."""


def screen(path: str | os.PathLike[str], *, digest: bool = True, recall: Recall | None = None) -> ScreenResult:
    """What the weights of a file show without images, in milliseconds and without torch.

    It computes the channel Lipschitz score of every filter (CLP, as the detector ``lipschitz``), one layer at a time,
    and whether one label stands out in the last linear layer, or in any that may be it. A file does not say which
    batch norm follows which convolution, so names and shapes decide; a convolution without a norm that fits is scored
    by its plain spectral norms. The result is ``look closer`` or ``nothing found``, never a verdict: most backdoors do
    not show in such scores. A bad file gives the outcome ``error``, never an exception.

    Args:
        path: a checkpoint of ``torch.save`` or safetensors, or the index of shards. Nothing in it is executed.
            A text ``hf:ORG/NAME[@REVISION][/FILE]`` names a file on the Hugging Face Hub.
        digest: compute the SHA-256 of the file, which takes longer than the scores.
        recall: asked with the SHA-256 for an earlier result, such as one in a store; it needs ``digest``.

    Example:
        >>> result = screen("model.pth")
        >>> result.outcome, len(result.layers), result.heads[0].labels
        ('nothing found', 20, 3)
        >>> screen("missing.pth").error.message
        'Cannot load missing.pth: No such file or directory.'
    """
    started, start = datetime.now(UTC), time.perf_counter()
    found = _Found(ArtifactInfo(path=str(path)))
    error = _tried(path, digest, recall, found)
    if found.earlier is not None and error is None:
        return msgspec.structs.replace(found.earlier, artifact=found.artifact)
    reasons = () if error else tuple(_reasons(found.layers, found.heads))
    return ScreenResult(
        version=bdprune.__version__,
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
        artifact=found.artifact,
        outcome="error" if error else "look closer" if reasons else "nothing found",
        reasons=reasons,
        threshold=THRESHOLD,
        layers=() if error else tuple(found.layers),
        heads=() if error else tuple(found.heads),
        unscreened=found.outside,
        error=error,
    )


def screen_many(paths: Iterable[str | os.PathLike[str]], *, digest: bool = True) -> Iterator[ScreenResult]:
    """One result of ``screen`` for each path, in order, as soon as it is ready; it keeps none of them."""
    return (screen(path, digest=digest) for path in paths)


def _artifact(path: str | os.PathLike[str], stored: StoredCheckpoint, digest: bool) -> ArtifactInfo:
    return ArtifactInfo(
        path=str(path),
        format=stored.format,
        bytes=stored.bytes,
        sha256=stored.sha256() if digest else None,
        sets=tuple(stored.states),
    )


@dataclass
class _Found:
    """What a screen has found so far."""

    artifact: ArtifactInfo
    outside: tuple[str, ...] = ()
    earlier: ScreenResult | None = None
    layers: list[LayerScreen] = field(default_factory=list)
    heads: list[HeadScreen] = field(default_factory=list)


def _tried(path: str | os.PathLike[str], digest: bool, recall: Recall | None, found: _Found) -> ErrorInfo | None:
    """Screens the file into ``found``; the error if that fails."""
    try:
        if is_hub_name(path):
            path = one_file(path)
            found.artifact = ArtifactInfo(path=str(path))
        before = _states([Path(path)])
        stored = open_stored(path)
        states = _states(stored.files)
        try:
            found.artifact, found.outside = _artifact(path, stored, digest), stored.outside
            if recall is not None and found.artifact.sha256 is not None:
                found.earlier = recall(found.artifact.sha256)
            if found.earlier is None:
                _screen(stored, found)
            if before != states[:1] or states != _states(stored.files):
                raise ArtifactError("it changed while it was read.", "Screen it again when it is complete.")
        except ArtifactError as failed:
            raise type(failed)(f"Cannot screen {path}: {failed.message}", failed.hint) from None
    except StoreError:  # of ``recall``: it is no error of this file
        raise
    except BdpruneError as failed:
        return ErrorInfo(type=type(failed).__name__, message=failed.message, hint=failed.hint)
    except Exception as failed:  # one file must not stop a service
        what = f"Unexpected {type(failed).__name__}: {first_line(failed)}"
        return ErrorInfo(type=type(failed).__name__, message=what, hint="Please report it.")
    return None


def _states(files: Sequence[Path]) -> list[object]:
    """What changes with each file, without reading it; None for one that is gone."""
    found: list[object] = []
    for path in files:
        try:
            state = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return found


def _screen(stored: StoredCheckpoint, found: _Found) -> None:
    for name, tensors in stored.states.items():
        start = f"{name}/" if len(stored.states) > 1 else ""
        found.layers += _layers(start, tensors)
        found.heads += [screen_head(head, tensors, start) for head in find_heads(tensors)]
    if not found.layers and not found.heads:
        hint = "A screen reads convolutions and the last linear layer. Use `bdprune scan`."
        raise UnsupportedError("it has neither a convolution nor a linear layer.", hint)


def _layers(start: str, tensors: Mapping[str, StoredTensor]) -> Iterator[LayerScreen]:
    """The scores of every convolution: every float tensor of four dimensions, except for masks."""
    norms = norms_of_convolutions({name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or not tensor.is_floating_point() or name.endswith("_mask"):
            continue
        module = name.rpartition(".")[0] if name.rpartition(".")[2] == "weight" else name
        norm = norms.get(module)
        scores = filter_scores(name, tensor, None if norm is None else norm_gain(norm, tensors))
        z = z_scores(scores)
        worst = int(z.argmax()) if len(z) else 0
        yield LayerScreen(
            layer=f"{start}{module}",
            norm=norm or "",
            filters=len(scores),
            filter=worst,
            max=float(scores[worst]) if len(scores) else None,
            max_z=float(z[worst]) if len(z) else 0.0,
        )


def _reasons(layers: Iterable[LayerScreen], heads: Iterable[HeadScreen]) -> Iterator[str]:
    for layer in layers:
        if layer.max_z > THRESHOLD:
            yield (
                f"Filter {layer.filter} of {layer.layer or 'the convolution'} lies {layer.max_z:.1f} standard "
                f"deviations above the others of its layer (threshold {THRESHOLD:g})."
            )
    for head in heads:
        for one in head.statistics:
            if one.flagged:
                yield (
                    f"Label {one.label} stands out in the {_WORDS[one.statistic]} of {head.layer or 'the head'} by "
                    f"{one.z:.1f} robust standard deviations (threshold {one.threshold:g})."
                )


_WORDS = {
    "norm": "norms of the rows",
    "mean": "mean weights of the rows",
    "positive": "sums of positive weights of the rows",
    "bias": "biases",
}
