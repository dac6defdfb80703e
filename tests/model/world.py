"""A world with its own time: event loops that are stepped one by one, a store on the far side of a network.

Nothing here waits. Time jumps to the next moment at which something is due, and a seeded chance decides which
of those that could go on goes on. A process that is killed or stopped is simply stepped no more; what it had
sent travels on, and lands.
"""

# ruff: noqa: D102 (the methods are asyncio's and the bucket's own, and are described there)

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, TypeVar, cast

from ckpt_sidecar.bucket import (
    BucketError,
    Condition,
    Conflict,
    Corrupt,
    Denied,
    ObjectRef,
    Part,
    Sink,
    Source,
    Span,
    Unreachable,
    Upload,
    crc64,
)
from tests.engine.support import BORN, Steps
from tests.fakes import BytesSink, BytesSource, MemoryBucket

T = TypeVar("T")
SPIN = 50_000  # so many steps without any time passing are no work any more
WRITES = frozenset({"put", "create", "part", "complete", "delete"})
CLEARING = frozenset({"abort", "list_uploads", "list_parts"})  # with these an upload is thrown away
BEFORE = ("unreachable", "throttled", "denied", "conflict", "corrupt")  # nothing has happened
AFTER = ("lost", "echo", "late")  # it happens, and the answer does not say so


class Killed(BaseException):
    """The process is dead; whatever it still tries comes to nothing."""


class Loop:
    """One process's event loop, as far as asyncio needs it; the world steps it.

    What would run in a thread is one step of it.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.time = now
        self.troubles: list[str] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = count()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, cast("Any", self), context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, cast("Any", self), context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=cast("Any", self))

    def create_task(self, coro: Any, **more: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=cast("Any", self), **more)

    def run_in_executor(self, _executor: Any, func: Any, *args: Any) -> Any:
        done = self.create_future()

        def work() -> None:
            if not done.cancelled():
                try:
                    done.set_result(func(*args))
                except BaseException as error:  # noqa: BLE001  (whoever waits for the thread gets it)
                    done.set_exception(error)

        self.call_soon(work)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Killed):
            self.troubles.append(f"{context['message']}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is passed over when it is due."""

    def due(self) -> float:
        """When there is something to do; infinite when there is nothing."""
        while self._timers and self._timers[0][-1].cancelled():
            heapq.heappop(self._timers)
        if self._ready:
            return self.time()
        return self._timers[0][0] if self._timers else float("inf")

    def step(self, *, hurry: bool = False) -> None:
        """Run what is next; in a `hurry` no timer is waited for."""
        while self._timers and (self._timers[0][0] <= self.time() or (hurry and not self._ready)):
            self._ready.append(heapq.heappop(self._timers)[-1])
        handle = self._ready.popleft()
        if not handle.cancelled():
            asyncio._set_running_loop(cast("Any", self))
            try:
                handle._run()
            finally:
                asyncio._set_running_loop(None)


# --- the network and the store -----------------------------------------------------------------------


class Process(Protocol):
    """Who asks the store."""

    loop: Loop
    dead: bool
    fenced_at: float | None

    def tick(self) -> None:
        """Do one step; Killed when that was the last one."""


@dataclass(slots=True)
class Fault:
    """What happens to the next `left` requests of that verb ("" for any)."""

    kind: str
    verb: str
    left: int


@dataclass(slots=True)
class Request:
    """On its way. `cut`: whoever sent it has given up in the middle of the body, so it never arrives."""

    verb: str
    sender: Process
    answer: asyncio.Future[Any]
    fault: str = ""
    cut: bool = False
    arrived: bool = False


class Store:
    """The bucket's own process, and the network before it: what was sent is carried out for the dead too."""

    def __init__(self, world: World, memory: MemoryBucket, *, orderly: bool) -> None:
        self.loop = Loop(lambda: world.now)
        self.memory = memory
        self.faults: list[Fault] = []
        self.orphans: set[str] = set()  # uploads that came to be when nobody waited for their id any more
        self.flipped = 0  # answers with a wrong bit, so far
        self.littered = False  # somebody could not throw an upload away when it was time to
        self._world = world
        self._orderly = orderly  # nothing lands after its sender has gone
        self.under_way: list[Request] = []

    def send(self, verb: str, call: Callable[[], Awaitable[Any]], sender: Process) -> Request:
        """Send a request."""
        request = Request(verb, sender, sender.loop.create_future(), self._fault("", verb))
        self.under_way.append(request)
        self.loop.create_task(self._serve(request, call))
        return request

    def _fault(self, *verbs: str) -> str:
        for fault in self.faults:
            if fault.left and fault.verb in verbs:
                fault.left -= 1
                return fault.kind
        return ""

    async def _serve(self, request: Request, call: Callable[[], Awaitable[Any]]) -> None:
        slow = self._world.chance.uniform(5, 200) if request.fault == "slow" else 0.0
        await asyncio.sleep(slow or self._world.chance.choice((0.0, 0.0, 0.01, 0.3)))
        try:
            if request.fault == "late":
                self._reply(request, Unreachable("no answer in time", reason="timeout"))
                await asyncio.sleep(self._world.chance.uniform(0.1, 90))
            if request.cut or (self._orderly and request.sender.dead):
                return
            request.arrived = True
            self.littered |= bool(request.fault) and request.verb in CLEARING
            self.littered |= (request.fault, request.verb) == ("denied", "put")  # the swap before an abort
            if request.fault in BEFORE:
                self._reply(request, _error(request.fault))
            else:
                await self._carry_out(request, call)
        finally:
            self.under_way.remove(request)

    async def _carry_out(self, request: Request, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            result = await call()
        except BucketError as error:
            result = error
        if request.verb == "create" and (request.answer.done() or request.sender.dead):
            self.orphans.add(result)
        if request.fault == "lost":
            result = Unreachable("the answer was lost", reason="connection")
        if request.fault == "echo":
            result = Conflict("the retry of a proxy has met its own echo")
        self._reply(request, result)

    def _reply(self, request: Request, result: Any) -> None:
        if request.answer.done() or request.sender.dead:
            return
        if isinstance(result, BucketError):
            request.answer.set_exception(result)
        else:
            request.answer.set_result(result)


def _error(kind: str) -> BucketError:
    return {
        "unreachable": Unreachable("no route", reason="connection"),
        "throttled": Unreachable("slow down", reason="throttled", retry_after=20.0),
        "denied": Denied("not allowed"),
        "conflict": Conflict("another write is under way"),
        "corrupt": Corrupt("the store saw other bytes"),
    }[kind]


class Wire(Steps):
    """The bucket as one process sees it."""

    def __init__(self, world: World, sender: Process) -> None:
        super().__init__(world.store.memory)
        self._world, self._sender = world, sender

    async def _step(self, verb: str, key: str, call: Callable[[], Awaitable[T]]) -> T:
        return await self._ask(verb, call, body=verb in ("part", "get_range"))

    async def _ask(self, verb: str, call: Callable[[], Awaitable[T]], *, body: bool) -> T:
        it, now = self._sender, self._world.now
        it.tick()
        if verb in WRITES and it.fenced_at is not None and now > it.fenced_at:
            self._world.complain(f"{verb} by one who knows that it is fenced")
        request = self._world.store.send(verb, call, it)
        try:
            result: T = await request.answer
        except asyncio.CancelledError:
            request.cut = body and not request.arrived  # a body that has left is waited for, see bodies.py
            while request.arrived and body and request in self._world.store.under_way and not it.dead:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            raise
        return result

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        content = body if isinstance(body, bytes) else _read(body[0], Span(1, 0, body[1]))
        return await self._ask(
            "put",
            lambda: self.inner.put(key, content, when=when, metadata=metadata),
            body=not isinstance(body, bytes),
        )

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        held = BytesSource(bytes(span.offset) + _read(source, span))
        return await super().put_part(upload, span, held)

    async def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        async def all_of_it() -> Sequence[ObjectRef]:
            return [each async for each in self.inner.list(prefix)]

        for each in await self._ask("list", all_of_it, body=False):
            yield each

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        arrived = BytesSink(span.end)
        await super().get_range(ref, span, arrived)
        content = memoryview(arrived.content)[span.offset :]
        if self._world.store._fault("flip"):
            self._world.store.flipped += 1
            content[min(36, span.size - 1)] ^= 1  # in the data, where no format can tell
        sink.write_at(span.offset, content)
        return crc64(content)


def _read(source: Source, span: Span) -> bytes:
    content = bytearray(span.size)
    if source.read_into(span.offset, memoryview(content)) < span.size:
        raise Corrupt(f"part {span.number}: the source came short")
    return bytes(content)


# --- the world ---------------------------------------------------------------------------------------


class World:
    """Time, chance, the store, and whoever lives; what must never be is collected in `complaints`."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0  # monotonic, in seconds
        self.ahead = 0  # ns by which the wall clock has been set
        self.chance = random.Random(seed)
        self.numbers = count(1)
        self.complaints: list[str] = []
        self.store: Store
        self.alive: list[Process] = []  # those that are stepped
        self.after_step: Callable[[Process], None] = lambda _: None
        self._still = 0

    def wall(self) -> int:
        """What the wall clock says, in ns since the epoch."""
        return BORN + int(self.now * 1e9) + self.ahead

    def complain(self, what: str) -> None:
        """Note what must never be."""
        self.complaints.append(what)

    def step(self, *, until: float = float("inf")) -> bool:
        """Let one of those that are due first go on; False when nobody is before `until`."""
        loops: list[tuple[Loop, Process | None]] = [(each.loop, each) for each in self.alive]
        loops.append((self.store.loop, None))
        dues = [(max(loop.due(), self.now), loop, process) for loop, process in loops]
        soonest = min(due for due, _, _ in dues)
        if soonest > until or soonest == float("inf"):
            return False
        self._still = 0 if soonest > self.now else self._still + 1
        assert self._still < SPIN, "somebody spins"
        self.now = soonest
        _, loop, process = self.chance.choice([each for each in dues if each[0] == soonest])
        loop.step()
        if process is not None:
            self.after_step(process)
        assert not self.complaints, self.complaints
        return True

    def steps(self, n: int) -> None:
        """Take so many steps."""
        for _ in range(n):
            if not self.step():
                return

    def pass_time(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let so much time pass, or less when it `until` is so."""
        end = self.now + seconds
        while not until() and self.step(until=end):
            pass
        if not until():
            self.now = end
