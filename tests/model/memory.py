"""All that a sidecar at rest has in memory, as a value: whoever has the same goes on the same."""

from __future__ import annotations

import asyncio
import enum
import io
import threading
from collections import deque
from collections.abc import Coroutine, Hashable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from ckpt_sidecar.disk import Disk
from tests.model.wire import Wire

# What has no state of its own at rest: code, and what a test has put in place of the world outside.
_EMPTY = (Wire, Disk, asyncio.Future, asyncio.AbstractEventLoop, io.IOBase, partial, Coroutine)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_PLAIN = (str, int, float, bytes, type(None), enum.Enum)


def memory_of(thing: Any, root: Path) -> Hashable:
    """The thing and all that it leads to; TypeError where it is not known what that is."""
    return _Memory(root).of(thing)


class _Memory:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._met: dict[int, int] = {}

    def of(self, thing: Any) -> Hashable:
        if isinstance(thing, _PLAIN):
            return thing
        if isinstance(thing, Path):
            return str(thing).replace(str(self._root), "")
        if not _is_value(thing):
            if id(thing) in self._met:
                return "met", self._met[id(thing)]
            self._met[id(thing)] = len(self._met)
        return type(thing).__name__, self._inside(thing)

    def _inside(self, thing: Any) -> Hashable:  # noqa: PLR0911  one line for each kind
        if isinstance(thing, Mapping):
            return tuple((self.of(key), self.of(value)) for key, value in thing.items())
        if isinstance(thing, tuple | list | deque):
            return tuple(self.of(each) for each in thing)
        if isinstance(thing, set | frozenset):
            return frozenset(self.of(each) for each in thing)
        if isinstance(thing, asyncio.Event):
            return thing.is_set()
        if isinstance(thing, asyncio.Lock | _LOCKS[0]):
            return thing.locked()
        if isinstance(thing, count):
            return repr(thing)
        if isinstance(thing, (*_EMPTY, _LOCKS[1])) or callable(thing):
            return ""
        if type(thing).__module__.startswith("ckpt_sidecar."):
            return tuple((name, self.of(value)) for name, value in _attributes(thing))
        raise TypeError(f"what is in a {type(thing)}?")


def _is_value(thing: Any) -> bool:
    """Can nobody change it, so that another of the same content is as good?"""
    frozen = getattr(type(thing), "__dataclass_params__", None)
    return isinstance(thing, tuple) or (frozen is not None and frozen.frozen)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    names = vars(thing) if hasattr(thing, "__dict__") else thing.__slots__
    yield from ((name, getattr(thing, name)) for name in names)
