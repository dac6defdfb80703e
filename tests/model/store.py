"""A bucket as a value: what stands in it, and what each request makes of that. Nothing here waits.

It answers as S3 does: an etag is the MD5 of the content, an upload that was completed or aborted is gone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from ckpt_sidecar.bucket import Absent, Condition, ObjectRef, Part, crc64, encode_crc64

Meta: TypeAlias = tuple[tuple[str, str], ...]

# --- what stands in it -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Object:
    """What stands at a key."""

    key: str
    body: bytes
    etag: str
    meta: Meta

    @property
    def ref(self) -> ObjectRef:
        """As a bucket shows it."""
        crc = encode_crc64(crc64(self.body))
        return ObjectRef(self.key, len(self.body), self.etag, crc, None, dict(self.meta))


@dataclass(frozen=True, slots=True)
class Begun:
    """A multipart upload under way. `by`: which life began it; `heard`: it was told the id."""

    upload_id: str
    key: str
    meta: Meta
    by: str
    heard: bool
    late: bool = False
    parts: tuple[bytes, ...] = ()

    @property
    def listed(self) -> list[Part]:
        """Its parts, as a bucket lists them."""
        return [
            Part(n, len(each), _md5(each), encode_crc64(crc64(each))) for n, each in enumerate(self.parts, 1)
        ]


class Store(NamedTuple):
    """Everything in the bucket, in the order of keys and upload ids."""

    objects: tuple[Object, ...] = ()
    uploads: tuple[Begun, ...] = ()

    def at(self, key: str) -> Object | None:
        """What stands at the key."""
        return next((each for each in self.objects if each.key == key), None)

    def upload(self, upload_id: str) -> Begun | None:
        """The upload, while it is under way."""
        return next((each for each in self.uploads if each.upload_id == upload_id), None)

    def put(self, made: Object) -> Store:
        """The store with that object at its key."""
        others = [each for each in self.objects if each.key != made.key]
        return self._replace(objects=tuple(sorted([*others, made], key=lambda each: each.key)))

    def without(self, upload_id: str) -> Store:
        """The store without that upload."""
        return self._replace(uploads=tuple(each for each in self.uploads if each.upload_id != upload_id))

    def begin(self, begun: Begun) -> Store:
        """The store with that upload as it now is."""
        others = self.without(begun.upload_id).uploads
        return self._replace(uploads=tuple(sorted([*others, begun], key=lambda each: each.upload_id)))


# --- requests ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Get:
    """Read a small object."""

    key: str


@dataclass(frozen=True, slots=True)
class Head:
    """Look at a key."""

    key: str


@dataclass(frozen=True, slots=True)
class Objects:
    """List what stands under a prefix."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Range:
    """Read some of this very object."""

    key: str
    etag: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Uploads:
    """List the uploads at a key."""

    key: str


@dataclass(frozen=True, slots=True)
class Parts:
    """List an upload's parts."""

    upload_id: str


@dataclass(frozen=True, slots=True)
class PutPart:
    """Send a part."""

    upload_id: str
    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Put:
    """Write an object. `match` is the etag that must stand there, None for nothing."""

    key: str
    body: bytes
    match: str | None
    meta: Meta


@dataclass(frozen=True, slots=True)
class Create:
    """Begin an upload; `nonce` becomes its id."""

    key: str
    meta: Meta
    nonce: str
    by: str


@dataclass(frozen=True, slots=True)
class Complete:
    """Make an upload's object. `match` as in Put; `bound` tells whether the store looks at it."""

    key: str
    upload_id: str
    etags: tuple[str, ...]
    match: str | None
    bound: bool


@dataclass(frozen=True, slots=True)
class Abort:
    """Throw an upload away."""

    key: str
    upload_id: str


Request: TypeAlias = (
    Get | Head | Objects | Range | Uploads | Parts | PutPart | Put | Create | Complete | Abort
)
Write: TypeAlias = Put | Create | Complete | Abort  # a part replaces itself: it may as well be a read


@dataclass(frozen=True, slots=True)
class No:
    """The store says no: `kind` is conflict, key, upload or parts; or it says nothing at all: silence."""

    kind: str


Answer: TypeAlias = Object | Begun | bytes | str | tuple[Object, ...] | tuple[str, ...] | No | None
SILENCE = No("silence")


def etag_of(when: Condition) -> str | None:
    """The etag that must stand there, None for nothing."""
    return None if isinstance(when, Absent) else when.etag


def answered(store: Store, request: Request) -> tuple[Store, Answer]:
    """What the store is after the request, and what it says."""
    match request:
        case Put() | Create() | Complete() | Abort() | PutPart():
            return _written(store, request)
        case _:
            return store, _read(store, request)


def _read(  # noqa: PLR0911  one for each request
    store: Store, request: Get | Head | Objects | Range | Uploads | Parts
) -> Answer:
    match request:
        case Get(key):
            return store.at(key) or No("key")
        case Head(key):
            return store.at(key)
        case Objects(prefix):
            return tuple(each for each in store.objects if each.key.startswith(prefix))
        case Range(key, etag, start, end):
            found = store.at(key)
            if found is None:
                return No("key")
            return found.body[start:end] if found.etag == etag else No("conflict")
        case Uploads(key):
            return tuple(each.upload_id for each in store.uploads if each.key == key)
        case Parts(upload_id):
            return store.upload(upload_id) or No("upload")


def _written(  # noqa: PLR0911  one for each request
    store: Store, request: Write | PutPart
) -> tuple[Store, Answer]:
    match request:
        case Put(key, body, match, meta):
            if _etag(store.at(key)) != match:
                return store, No("conflict")
            made = Object(key, body, _md5(body), meta)
            return store.put(made), made
        case Create(key, meta, nonce, by):
            return store.begin(Begun(nonce, key, meta, by, heard=True)), nonce
        case PutPart(upload_id, number, body):
            begun = store.upload(upload_id)
            if begun is None:
                return store, No("upload")
            parts = (*begun.parts[: number - 1], body, *begun.parts[number:])
            return store.begin(replace(begun, parts=parts)), _md5(body)
        case Abort(_, upload_id):
            return (store.without(upload_id), None) if store.upload(upload_id) else (store, No("upload"))
        case Complete():
            return _completed(store, request)


def _completed(store: Store, request: Complete) -> tuple[Store, Answer]:
    if request.bound and _etag(store.at(request.key)) != request.match:
        return store, No("conflict")
    begun = store.upload(request.upload_id)
    if begun is None:
        return store, No("upload")
    if tuple(each.etag for each in begun.listed) != request.etags:
        return store, No("parts")
    body = b"".join(begun.parts)
    made = Object(request.key, body, f"{_md5(body)}-{len(begun.parts)}", begun.meta)
    return store.without(begun.upload_id).put(made), made


def in_vain(store: Store, request: Write) -> bool:
    """Can the request change nothing any more, whenever it lands?

    What stood at a key, and an upload that is gone, never come back: every write brings another etag.
    """
    match request:
        case Put(key, _, match, _):
            return _etag(store.at(key)) != match
        case Complete(key, upload_id, _, match, bound):
            return store.upload(upload_id) is None or (bound and _etag(store.at(key)) != match)
        case Abort(_, upload_id):
            return store.upload(upload_id) is None
        case Create():
            return False


def _etag(found: Object | None) -> str | None:
    return found.etag if found is not None else None


def _md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()
