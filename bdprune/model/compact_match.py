"""Recognises compact networks: by their description, as the architecture that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdprune.errors import ArchitectureError, BdpruneError
from bdprune.files import description_path
from bdprune.model.architectures import REGISTRY
from bdprune.model.architectures.spec import Shapes
from bdprune.model.channels import Compact, full_shapes, narrow_
from bdprune.model.recognise import Built, Fit, KnownMatcher, Matcher


@dataclass(frozen=True)
class CompactFit:
    """The fit of another matcher, for the original shapes if ``compact`` is given."""

    fit: Fit
    compact: Compact | None

    @property
    def names(self) -> frozenset[str]:
        return self.fit.names

    @property
    def inner(self) -> str:
        return self.fit.inner

    @property
    def heads(self) -> tuple[int, ...]:
        return self.fit.heads


class CompactMatcher:
    """Compares shapes as they are, and then with the removed channels of each description.

    Args:
        matcher: matches whole networks.
        networks: the descriptions.
        path: the checkpoint, for errors.
    """

    def __init__(self, matcher: Matcher, networks: Sequence[Compact], path: Path) -> None:
        self._matcher, self._networks, self._place = matcher, networks, description_path(path)

    def __call__(self, shapes: Shapes, extras: bool) -> CompactFit | None:
        """The network that fits; whole networks come first.

        Raises:
            BdpruneError: as the matcher of whole networks.
        """
        found = self._matcher(shapes, extras)
        if found is not None:
            return CompactFit(found, None)
        for compact, inner, full in self._full(shapes):
            fit = self._for(compact)(full, extras)
            if fit is not None and fit.inner == inner:
                return CompactFit(fit, compact)
        return None

    def build(self, fit: CompactFit) -> Built:
        """The network of a fit, without the removed channels.

        Raises:
            ArchitectureError: the description names layers that cannot lose these channels.
        """
        if fit.compact is None:
            return self._matcher.build(fit.fit)
        built = self._for(fit.compact).build(fit.fit)
        try:
            narrow_(built.network, fit.compact.layers)
        except ValueError as error:
            raise self.misfit(f"{error}.") from None
        return built

    def explain(self, shapes: Shapes) -> BdpruneError:
        """Why these shapes fit neither a whole network nor a description."""
        for compact, _, full in self._full(shapes):
            if ":" in compact.arch and isinstance(self._matcher, KnownMatcher):
                what = f"The checkpoint is a compact {compact.arch[:200]}, which is no known architecture."
                return ArchitectureError(what, f"Give --arch {compact.arch[:200]} if it is your own code.")
            error = self._for(compact).explain(full)
            return type(error)(f"{error.message} ({self._place} was taken into account.)", error.hint)
        return self.misfit("the numbers of channels differ.")

    def misfit(self, reason: str) -> ArchitectureError:
        """The error for a description of another network."""
        hint = "Give the description that was written with this checkpoint, or delete it if there is none."
        return ArchitectureError(f"The checkpoint does not fit its description {self._place}: {reason}", hint)

    def _full(self, shapes: Shapes) -> Iterator[tuple[Compact, str, Shapes]]:
        """Each description that has these channels, with its prefix inside the network and the original shapes."""
        for compact in self._networks:
            for inner in _shared_prefixes(compact.layers):
                layers = {path.removeprefix(inner): layer for path, layer in compact.layers.items()}
                full = full_shapes(shapes, layers)
                if full is not None and full != shapes:
                    yield compact, inner, full

    def _for(self, compact: Compact) -> Matcher:
        """The matcher of whole networks; of the described architecture alone if none was asked for."""
        matcher: Any = self._matcher
        if isinstance(matcher, KnownMatcher) and matcher.arch is None and compact.arch in REGISTRY:
            return KnownMatcher(compact.arch)
        return self._matcher


def _shared_prefixes(paths: Any) -> list[str]:
    """The empty prefix, and each prefix of whole parts that all paths share."""
    result = [""]
    while True:
        parts = {path.removeprefix(result[-1]).partition(".")[0] for path in paths}
        longer = f"{result[-1]}{parts.pop()}." if len(parts) == 1 else ""
        if not longer or not all(path.startswith(longer) for path in paths):
            return result
        result.append(longer)
