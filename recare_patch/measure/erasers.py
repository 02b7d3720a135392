"""What claims to have erased something, whoever made it: a patch, a LoRA, weights, a pipeline, a defence.

An eraser puts itself into a base's pipeline, goes again without a trace, and has a hash. All that measures works on
erasers, of which a :class:`~recare_patch.patch.Patch` is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

from recare_patch.core import EvaluationError, RecarePatchError, file_sha256, load_json
from recare_patch.measure.names import DEFENCES

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.patch import PatchMetadata
    from recare_patch.recipe import Concept

Defend = Callable[..., AbstractContextManager[Any]]
"""``(pipeline, concept, **options)`` gives a context in which a diffusers pipeline is defended.

Prompts are encoded, and pictures drawn, through the pipeline's own networks: hooks on them are heard, by attacks that
take gradients too, and a replaced ``__call__`` is not.
"""


class Applied(Protocol):
    """An eraser in a pipeline; as a context manager it takes itself out at its end."""

    def off(self) -> AbstractContextManager[None]:
        """Inside, the pipeline computes as the untouched base."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...


class Eraser(Protocol):
    """What is measured beside an untouched base."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def source(self) -> str:
        """Where it came from, for messages."""
        ...

    @property
    def metadata(self) -> PatchMetadata | None:
        """What a patch of this package says of itself; None for all others."""
        ...

    def sha256(self) -> str:
        """Of the file that it is, or of all its files."""
        ...

    def fingerprint(self) -> str:
        """A hash of what decides the pictures under it."""
        ...

    def check_base(self, base: BaseModel, *, strict: bool = False) -> bool:
        """Whether it is known to be for these very weights; an IncompatiblePatchError where it cannot be for them."""
        ...

    def apply(self, pipe: Any, scale: float = 1.0) -> Applied:
        """Put it into a pipeline, at a scale where 1 is what its maker means and 0 the untouched base."""
        ...


class Defence:
    """A component at sampling time, from an entry point of the group ``recare_patch.defences``."""

    metadata = None

    def __init__(self, name: str, defend: Defend, concept: Concept, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.source = name, f"the defence {name}"
        self.concept, self._defend, self._options = concept, defend, dict(options or {})

    @classmethod
    def named(cls, text: str, concept: Concept) -> Self:
        """That of ``NAME`` or ``NAME:key=value,…``, whose values are JSON, or words.

        Raises:
            UnknownNameError: no installed package brings one of that name.
            EvaluationError: an option is malformed.
        """
        name, _, told = text.partition(":")
        options: dict[str, Any] = {}
        for one in filter(None, told.split(",")):
            key, equals, value = map(str.strip, one.partition("="))
            if not equals or not key.isidentifier():
                raise EvaluationError(f"'{one}' is no option of the defence {name}: write key=value")
            try:
                options[key] = load_json(value)
            except ValueError:
                options[key] = value
        return cls(name, DEFENCES.get(name), concept, options)

    def sha256(self) -> str:
        """Of the source file that defines it, with its options: code is what it is made of."""
        module = sys.modules.get(getattr(self._defend, "__module__", ""))
        file = None
        with contextlib.suppress(TypeError):
            file = inspect.getsourcefile(module) if module is not None else None
        code = file_sha256(file) if file is not None else repr(self._defend)
        told = json.dumps([self.name, code, self._options, self.concept.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Of its code and options."""
        return self.sha256()

    def check_base(self, base: BaseModel, *, strict: bool = False) -> bool:
        """Tried on the base once, so that what does not work is said before anything is drawn."""
        with self.apply(base.pipeline):
            return False

    def apply(self, pipe: Any, scale: float = 1.0) -> AppliedDefence:
        """See :class:`Eraser`; EvaluationError where it fails, or another scale than 1 is asked for."""
        if scale != 1:
            raise EvaluationError(f"{self.source} is on or off: it has no scale {scale:g}")
        return AppliedDefence(self, lambda: self._defend(pipe, self.concept, **self._options))


class AppliedDefence:
    """A defence that is on."""

    def __init__(self, defence: Defence, start: Callable[[], AbstractContextManager[Any]]) -> None:
        self._told, self._start, self._stack = defence.source, start, contextlib.ExitStack()
        self._on()

    def _on(self) -> None:
        try:
            self._stack.enter_context(self._start())
        except RecarePatchError:
            raise
        # It is somebody else's code, which may raise anything.
        except Exception as fault:
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise EvaluationError(f"{self._told} failed: {type(fault).__name__}: {reason}") from fault

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Ended inside, and begun anew after it."""
        self._stack.close()
        try:
            yield
        finally:
            self._on()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
