"""An event loop in which nothing is left to chance: it runs until everybody waits, and no time passes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

_AbstractLoop: Any = asyncio.AbstractEventLoop  # of which we need a few calls, typed as nobody asks here


class Loop(_AbstractLoop):  # type: ignore[misc]
    """An event loop that runs until nothing is ready; threads run at once; no time passes."""

    def __init__(self) -> None:
        self.trouble: list[str] = []
        self._soon: deque[asyncio.Handle] = deque()

    def settle(self) -> None:
        """Run until everybody waits."""
        asyncio._set_running_loop(self)
        try:
            while self._soon:
                handle = self._soon.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)

    def time(self) -> float:
        """Stand still."""
        return 0.0

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        """As any loop."""
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Never come to it, unless it is due already."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if when <= self.time():
            self._soon.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """As `call_at`."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        """As any loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        """As any loop."""
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Do it here and now."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  a thread hands on whatever it is
            done.set_exception(error)
        return done

    def get_debug(self) -> bool:
        """Nothing is to be watched."""
        return False

    def is_running(self) -> bool:
        """It is all there is."""
        return True

    def is_closed(self) -> bool:
        """It has nothing to close."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody handled."""
        self.trouble.append(f"{context.get('message')}: {context.get('exception')!r}")
