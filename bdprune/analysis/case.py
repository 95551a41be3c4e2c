"""A case: one model, the clean images for its methods, and a memo of analyses.

A result that several methods need (spectral norms, statistics, the unlearned model, recovered masks) is an
:class:`Analysis`. It is computed once for each case: ``case.get(Lipschitz())`` looks it up by the digest of the model,
the digest of the images and the settings of the analysis. The keys do not depend on the process, so a repair can reuse
the analyses of a scan.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bdprune.data import CleanData
from bdprune.errors import BdpruneError, DataError, OptionError
from bdprune.model import Model
from bdprune.record import Attachment
from bdprune.runtime import Budget

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MOST_BYTES = 1 << 30
"""Size limit for the tensors in the memo of a process; the least recently used entry is dropped first."""
MOST_MODELS = 64
"""Limit for the models in the memo of a process, as many as a stack has: a fleet must not fill the memory."""


class Memo:
    """Computed values, by key. Drops the least recently used entries when it is full, and all entries of the model that
    was used longest ago when there are too many models.

    Args:
        most_bytes: size limit for the tensors, in bytes.
        most_models: limit for the number of models; the first part of a key is the digest of its model.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, most_models: int = MOST_MODELS) -> None:
        self._most, self._held, self._most_models = most_bytes, 0, most_models
        self._models: OrderedDict[Hashable, None] = OrderedDict()
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under ``key``; calls ``make`` and keeps its result if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                self._note_model(key)
                return self._entries[key][0]  # type: ignore[no-any-return]
        value = make()
        self.put(key, value)
        return value

    def put(self, key: Hashable, value: object) -> None:
        """Keeps ``value``, unless it exceeds the limit by itself."""
        size = _bytes_of(value)
        with self._lock:
            self._held -= self._entries.pop(key, (None, 0))[1]
            if size <= self._most:
                self._entries[key], self._held = (value, size), self._held + size
                self._note_model(key)
            while self._held > self._most:
                self._held -= self._entries.popitem(last=False)[1][1]

    def forget(self, digest: Hashable) -> None:
        """Drops all entries of the model with this digest."""
        with self._lock:
            self._forget(digest)

    def _note_model(self, key: Hashable) -> None:
        if isinstance(key, tuple):
            self._models[key[0]] = None
            self._models.move_to_end(key[0])
        if len(self._models) > self._most_models:
            self._forget(next(iter(self._models)))

    def _forget(self, digest: Hashable) -> None:
        self._models.pop(digest, None)
        for key in [key for key in self._entries if isinstance(key, tuple) and key[0] == digest]:
            self._held -= self._entries.pop(key)[1]

    def clear(self) -> None:
        """Drops everything; for benchmarks."""
        with self._lock:
            self._entries.clear()
            self._models.clear()
            self._held = 0


MEMO = Memo()
"""The memo of this process."""


@dataclass(frozen=True, eq=False)
class Case:
    """One model with its clean images and analyses.

    Args:
        model: never changed.
        data: labelled clean images ``[N, C, H, W]`` in [0, 1] of the model's clean task. None if there are none;
            methods that need some then do not run.
        own_memo: memo for the analyses. The default for a model from a file is the memo of the process, because its
            digest covers everything. The default for a module is a memo of its own, because no digest covers a module's
            code.
        attachments: bytes by their SHA-256, filled by :meth:`attach`.
        keeps: whether to keep attachments that are as large as the model, such as an unlearned model.
        budget: how thorough the work on the case is, and how long it may take.

    Raises:
        DataError: the images or labels do not fit the model.
        OptionError: the model is not a :class:`bdprune.Model`, or is on the meta device.

    Example:
        >>> import bdprune
        >>> from bdprune.analysis import Lipschitz
        >>> case = Case(bdprune.load("model.pth"))
        >>> scores = case.get(Lipschitz())
        >>> len(scores), case.get(Lipschitz()) is scores
        (20, True)
    """

    model: Model
    data: CleanData | None = None
    own_memo: Memo | None = None
    attachments: dict[str, bytes] = field(default_factory=dict, repr=False)
    keeps: bool = False
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        """Rejects input that would give a meaningless score."""
        if not isinstance(self.model, Model):
            raise OptionError(f"A case takes a model, not {type(self.model).__name__}.", "Load one with bdprune.load.")
        if any(value.is_meta for value in self.model.network.state_dict().values()):
            raise OptionError("The model is on the meta device: it has no weights.", "Load them first.")
        if self.data is not None:
            _check_images(self.data, self.model)

    @cached_property
    def memo(self) -> Memo:
        """The memo for the analyses."""
        return self.own_memo if self.own_memo is not None else (MEMO if self.is_known else Memo())

    @property
    def is_known(self) -> bool:
        """Whether the digest covers everything that determines the outputs: a module's code is not covered."""
        return _is_known(self.model)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and of everything else that determines the outputs."""
        model = self.model
        run = (model.arch, model.num_classes, model.input_shape, model.normalization, model.network)
        state = hashlib.sha256(repr(run).encode())
        for name, value in model.network.state_dict().items():
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return state.hexdigest()

    def get(self, analysis: Analysis[T]) -> T:
        """The result of ``analysis``, computed if it is not known yet. It is shared: do not change it."""
        return self.memo.get(self.key(analysis), lambda: analysis.compute(self))

    def key(self, analysis: Analysis[Any]) -> Hashable:
        """The key of the result in the memo."""
        data = self.data.digest if analysis.uses_data and self.data is not None else ""
        budget = (self.budget,) if analysis.uses_budget else ()
        return self.digest, str(self.model.device), data, analysis, *budget

    @property
    def key_of_all(self) -> tuple[str, str]:
        """Digests of the model and of the images."""
        return self.digest, self.data.digest if self.data is not None else ""

    @property
    def images(self) -> CleanData:
        """The clean images, for a method that has checked that they exist (:meth:`bdprune.methods.Method.check`)."""
        assert self.data is not None
        return self.data

    def sample(self, images: int, seed: int) -> Case:
        """The case with about ``images`` of its clean images: the same number of every class, at least one."""
        per_class = max(images // self.model.num_classes, 1)
        return self.with_data(self.images.sample(per_class, torch.Generator().manual_seed(seed)))

    def with_data(self, data: CleanData) -> Case:
        """The same model with other images, such as a part of them."""
        return self._changed(data=data)

    def with_budget(self, budget: Budget) -> Case:
        """The same case with another budget."""
        return self._changed(budget=budget)

    def _changed(self, **fields: Any) -> Case:
        """The same model with other fields; the digest is not computed again."""
        other = replace(self, **fields, own_memo=self.memo)
        if "digest" in self.__dict__:
            other.__dict__["digest"] = self.digest
        return other

    def in_order(self) -> Case:
        """The same case with the images sorted by content, so that results do not depend on their order."""
        return self if self.data is None or self.data.by_content is self.data else self.with_data(self.data.by_content)

    def with_model(self, model: Model) -> Case:
        """Another form of the model with the same images."""
        return Case(model, self.data, self.memo, self.attachments, self.keeps, self.budget)

    def attach(self, name: str, tensors: Mapping[str, Tensor]) -> Attachment:
        """Keeps tensors, as safetensors, and returns their record."""
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        return self.attach_bytes(name, save(plain), "application/safetensors")

    def attach_bytes(self, name: str, content: bytes, media_type: str) -> Attachment:
        """Keeps bytes, such as a picture, and returns their record.

        Args:
            name: lower-case letters, digits, ``-`` and ``_``; it becomes part of a file's name.

        Raises:
            ValueError: the name has other characters.
        """
        digest = hashlib.sha256(content).hexdigest()
        record = Attachment(name=name, media_type=media_type, sha256=digest, bytes=len(content))
        self.attachments[digest] = content
        return record


class Analysis(ABC, Generic[T_co]):
    """A result about a case that several methods need: a frozen dataclass, whose fields are the settings."""

    uses_data: ClassVar[bool] = True
    """Whether the result depends on the clean images."""

    uses_budget: ClassVar[bool] = False
    """Whether the result depends on the budget, so that one of a shorter search is not taken for a full one."""

    batch_size: int = 0
    """Images of each model in a step of training; 0 for an analysis that does not train."""

    @abstractmethod
    def compute(self, case: Case) -> T_co:
        """The result for one case."""

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[T_co | BdpruneError]:
        """The results for models of one architecture on the same images; an error for each model that failed."""
        return [outcome_of(lambda case=case: self.compute(case)) for case in cases]  # type: ignore[misc]


def _check_images(data: CleanData, model: Model) -> None:
    """Checks that the model can take the clean images.

    Raises:
        DataError: it cannot.
    """
    if not isinstance(data, CleanData):
        raise DataError(
            f"Clean data must be CleanData, not {type(data).__name__}.", "Use bdprune.CleanData(images, labels)."
        )
    images, labels = data.images, data.labels
    if images.is_meta or labels.is_meta:
        raise DataError("The clean images are on the meta device: they have no values.", "Give them on the CPU.")
    found = f"images {images.dtype} {list(images.shape)} and labels {labels.dtype} {list(labels.shape)}"
    wanted = "Give images [N, C, H, W] float32 in [0, 1], and labels [N] int64 of the model's classes."
    fits = images.is_floating_point() and images.shape[1:] == model.input_shape and labels.dtype == torch.int64
    if not fits or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(f"A model of input shape {model.input_shape} cannot take {found}.", wanted)
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise DataError(f"The clean images have values from {float(low):g} to {float(high):g}.", wanted)
    if not (labels.min() >= 0 and labels.max() < model.num_classes):
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise DataError(f"The labels range from {span}, the model has classes 0 to {model.num_classes - 1}.", wanted)


def outcome_of(run: Callable[[], T]) -> T | BdpruneError:
    """The result of ``run``, or the :class:`BdpruneError` that it raises."""
    try:
        return run()
    except BdpruneError as error:
        return error


def _is_known(model: Model) -> bool:
    """Whether weights and architecture fully describe a model: it is from a file, with layers of bdprune or torch."""
    return model.artifact is not None and ":" not in model.arch and all(map(_is_plain, model.network.modules()))


def _is_plain(layer: nn.Module) -> bool:
    """Whether its class and settings fully describe what a layer computes."""
    ours = type(layer).__module__.startswith(("bdprune.", "torch.nn."))
    return ours and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _bytes_of(value: object) -> int:
    """Size in bytes of the tensors in ``value``."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Model):
        return sum(map(_bytes_of, value.network.state_dict().values()))
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes_of, value))
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_bytes_of(getattr(value, one.name)) for one in fields(value))
    return 0
