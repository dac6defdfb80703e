"""The one retry: a bucket that says again what is safe to say again, and nothing else.

Reads, parts (the same number replaces) and aborts are repeated. Writes that could land twice, or whose
answer decides something (put, create, complete, delete), are not: who called looks, then decides (rule 8).
botocore's own retries are off, for it cannot know the difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

from ckpt_sidecar.bucket import (
    Abilities,
    Bucket,
    Condition,
    Corrupt,
    ObjectRef,
    Part,
    Sink,
    Source,
    Span,
    Unchanged,
    Unreachable,
    Upload,
)
from ckpt_sidecar.events import Event, Retrying
from ckpt_sidecar.policy import retry_delay

T = TypeVar("T")
TRIES = 6  # about half a minute with full jitter; then the caller lets others go first and comes back


async def together(*work: Coroutine[None, None, None]) -> None:
    """Run all of it; when one fails the others are cancelled, and that one's own error comes out.

    But a cancel of the caller's comes out whatever fails just then. A task group raises the errors in its
    place: whoever takes those for the bucket's trouble goes on, and never hears that it is over.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    errors: list[BaseException] = []
    cancelled = False

    def cancel_all() -> None:
        for each in tasks:
            each.cancel()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)
            cancel_all()

    for each in tasks:
        each.add_done_callback(ended)
    while not all(each.done() for each in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
            cancel_all()
    if cancelled:
        raise asyncio.CancelledError
    if errors:
        raise errors[0]


class PatientBucket:
    """A `Bucket` around another one, with the retry. It raises what that one raised last."""

    def __init__(
        self,
        inner: Bucket,
        *,
        sleep: Callable[[float], Awaitable[None]],
        chance: Callable[[], float],
        tell: Callable[[Event], None],
        tries: int = TRIES,
    ) -> None:
        self._inner = inner
        self._sleep = sleep
        self._chance = chance
        self._tell = tell
        self._tries = tries

    async def _again(self, operation: str, call: Callable[[], Awaitable[T]]) -> T:
        for tries in range(1, self._tries):
            try:
                return await call()
            except (Unreachable, Corrupt) as error:
                asked = error.retry_after if isinstance(error, Unreachable) else 0.0
                delay = retry_delay(tries, chance=self._chance(), asked=asked)
                self._tell(Retrying(operation, error.reason, delay, str(error)))
                await self._sleep(delay)
        return await call()

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self._inner.name

    @property
    def abilities(self) -> Abilities:
        """What the store was seen to honour."""
        return self._inner.abilities

    async def probe(self, key: str) -> Abilities:
        """As `Bucket.probe`, repeated: it cleans up after itself."""
        return await self._again("probe", lambda: self._inner.probe(key))

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectRef]:
        """As `Bucket.get`, repeated."""
        return await self._again("get", lambda: self._inner.get(key, limit=limit))

    async def head(self, key: str) -> ObjectRef | None:
        """As `Bucket.head`, repeated."""
        return await self._again("head", lambda: self._inner.head(key))

    async def put(
        self, key: str, body: bytes | tuple[Source, int], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As `Bucket.put`, said once."""
        return await self._inner.put(key, body, when=when, metadata=metadata)

    async def create_multipart(self, key: str, *, metadata: Mapping[str, str]) -> str:
        """As `Bucket.create_multipart`, said once."""
        return await self._inner.create_multipart(key, metadata=metadata)

    async def put_part(self, upload: Upload, span: Span, source: Source) -> Part:
        """As `Bucket.put_part`, repeated."""
        return await self._again("put_part", lambda: self._inner.put_part(upload, span, source))

    async def list_parts(self, upload: Upload) -> list[Part]:
        """As `Bucket.list_parts`, repeated."""
        return await self._again("list_parts", lambda: self._inner.list_parts(upload))

    async def complete_multipart(
        self, upload: Upload, parts: Sequence[Part], *, when: Condition, metadata: Mapping[str, str]
    ) -> ObjectRef:
        """As `Bucket.complete_multipart`, said once."""
        return await self._inner.complete_multipart(upload, parts, when=when, metadata=metadata)

    async def abort_multipart(self, upload: Upload) -> None:
        """As `Bucket.abort_multipart`, repeated; Missing("upload") may then be the echo of the first try."""
        await self._again("abort_multipart", lambda: self._inner.abort_multipart(upload))

    async def list_uploads(self, key: str) -> list[Upload]:
        """As `Bucket.list_uploads`, repeated."""
        return await self._again("list_uploads", lambda: self._inner.list_uploads(key))

    def list(self, prefix: str) -> AsyncIterator[ObjectRef]:
        """As `Bucket.list`, said once."""
        return self._inner.list(prefix)

    async def delete(self, key: str, *, when: Unchanged, version_id: str | None = None) -> None:
        """As `Bucket.delete`, said once."""
        await self._inner.delete(key, when=when, version_id=version_id)

    async def get_range(self, ref: ObjectRef, span: Span, sink: Sink) -> int:
        """As `Bucket.get_range`, repeated."""
        return await self._again("get_range", lambda: self._inner.get_range(ref, span, sink))
