"""Which implementation of an op runs on a GPU, and why.

A backend is a module of the room with

    supports(problem) -> str | None     None when it can run the problem and should, else the reason why not
    able(problem)     -> str | None     optional, the same without what is only a matter of speed
    config(problem)   -> object         the tuned or default configuration (a pure function; None if it has none)
    launch(*tensors, out, config)       writes `out`; allocates nothing the caller sees, never synchronizes

The room lists its backends best first and the first that supports the problem wins: an order that can be read replaces
priorities. A backend that is slower than a later one for a problem says so in its reason. The environment variable
``QUANTLAB_<ROOM>_BACKEND`` forces one by name, and the call fails if that one is not able.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from types import ModuleType

MOST = 4096  # problems that are remembered; a server meets one for each number of tokens
remembered = functools.lru_cache(maxsize=MOST)  # what a function makes of a problem


class FallbackWarning(UserWarning):
    """A GPU call took a slow way; the text says why. Given once per room and reason."""


class Mendable(str):
    """A reason that the user can do something about (a package that is missing): falling past it warns."""

    __slots__ = ()


@dataclass(frozen=True)
class Verdict:
    """What one backend says to one problem; `reason` is None when it can run it, `chosen` marks the one that would."""

    backend: str
    reason: str | None
    chosen: bool


class Backends:
    """The backends of one room, best first.

    room         name of the room's folder
    names        module names inside it
    last_resort  name of the backend that is slow and always right; taking it on a GPU warns
    """

    def __init__(self, room: str, names: tuple[str, ...], last_resort: str | None = None) -> None:
        self.room = room
        self.names = names
        self.last_resort = last_resort
        self.variable = f"QUANTLAB_{room.upper()}_BACKEND"
        self._chosen: dict[tuple[Hashable, str | None], ModuleType] = {}
        self._warned: set[str] = set()

    def module(self, name: str) -> ModuleType:
        """The backend called `name`, one of `names`."""
        return importlib.import_module(f"quantlab_kernels.{self.room}.{name}")

    def reason(self, name: str, problem: Hashable, *, question: str = "supports") -> str | None:
        """Why the backend does not take the problem, or None; for one that does not import, the module it lacks."""
        if name not in self.names:
            return f"no backend is called so, there are {', '.join(self.names)}"
        try:
            module = self.module(name)
            return getattr(module, question, module.supports)(problem)
        except ModuleNotFoundError as error:
            return Mendable(f"{error.name} is not installed")

    def select(self, problem: Hashable) -> ModuleType:
        """The backend that runs the problem. Raises RuntimeError with every reason when none can."""
        forced = os.environ.get(self.variable)
        chosen = self._chosen.get((problem, forced))
        if chosen is None:
            if len(self._chosen) >= MOST:
                self._chosen.clear()
            chosen = self._chosen[problem, forced] = self._forced(forced, problem) if forced else self._first(problem)
        return chosen

    def explain(self, problem: Hashable) -> list[Verdict]:
        """Every backend with its reason, in order, for `quantlab explain`."""
        reasons = {name: self.reason(name, problem) for name in self.names}
        forced = os.environ.get(self.variable)
        if forced:
            reasons[forced] = self.reason(forced, problem, question="able")
        able = [name for name, reason in reasons.items() if reason is None]
        chosen = forced if forced in able else None if forced else next(iter(able), None)
        return [Verdict(name, reason, name == chosen) for name, reason in reasons.items()]

    def _forced(self, name: str, problem: Hashable) -> ModuleType:
        reason = self.reason(name, problem, question="able")
        if reason is not None:
            raise RuntimeError(f"{self.variable}={name} cannot run {problem}: {reason}")
        return self.module(name)

    def _first(self, problem: Hashable) -> ModuleType:
        refused: dict[str, str] = {}
        for name in self.names:
            reason = self.reason(name, problem)
            if reason is None:
                self._warn(name, refused, problem)
                return self.module(name)
            refused[name] = reason
        listing = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(f"{self.room}: no backend runs {problem}. {listing}")

    def _warn(self, name: str, refused: dict[str, str], problem: Hashable) -> None:
        mendable = {n: r for n, r in refused.items() if isinstance(r, Mendable)}
        told = refused if name == self.last_resort else mendable
        text = "; ".join(f"{backend}: {reason}" for backend, reason in told.items())
        if text and text not in self._warned:
            self._warned.add(text)
            message = f"{self.room} runs on its {name} backend, because {text} (first met with {problem})"
            warnings.warn(message, FallbackWarning, stacklevel=4)
