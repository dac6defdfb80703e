"""The way to S3, hurt at every request: a sidecar's life behind a proxy, before a real store.

The jobs make every request that there is. They run undisturbed first, and the proxy writes down what comes
by. Then they run again for each of those requests and each way of hurting it; the end must be the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckpt_sidecar import clients, sidecar
from ckpt_sidecar.bucket import (
    MIB,
    Abilities,
    ObjectRef,
    Span,
    Upload,
    crc64,
    encode_crc64,
)
from ckpt_sidecar.checkpoint import Book, Id, Uploading, advance
from ckpt_sidecar.document import dump, parse
from ckpt_sidecar.events import Failed, Ready, Restored
from ckpt_sidecar.manifest import Announced, Entry, Manifest, committed, self_description
from ckpt_sidecar.patience import PatientBucket
from ckpt_sidecar.s3 import S3Bucket
from ckpt_sidecar.settings import Settings
from ckpt_sidecar.sidecar import Sidecar, World
from tests.conftest import ON_ONE, admin, create_bucket
from tests.engine.support import BORN, Told, holder, opened_spool, pin, save, times
from tests.fakes import BytesSink, BytesSource
from tests.proxy import EVERY, FOR_LONG, Answer, Broken, Damaged, Fault, Proxy, Slow, Whole

PART = 5 * MIB  # S3 takes no smaller ones
LARGE = random.Random(5).randbytes(3 * PART)
TWO_PARTS = PART + 1000
ANSWER_SECONDS = 2.0  # a store that says nothing for so long is given up
HASTE = 1000.0  # how much shorter a sleep is here


FILES = {"old.pt": 100, "newest.pt": TWO_PARTS, "big.pt": TWO_PARTS, "doubt.pt": TWO_PARTS, "saved.pt": 200}

# --- a job that makes every request ----------------------------------------------------------------------


class Way:
    """The bucket by way of the proxy, and past it."""

    def __init__(self, proxy: Proxy, bucket: S3Bucket, direct: Any) -> None:
        self.proxy = proxy
        self.bucket = bucket
        self.direct = direct
        self.told = Told()
        self._cells = count(1)

    @property
    def checked(self) -> bool:
        """Does the store keep checksums?"""
        return self.bucket.abilities.checksum

    def cell(self) -> str:
        """Return a prefix that nobody has used."""
        return f"cell-{next(self._cells)}/"


@asynccontextmanager
async def way(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Way]:
    """Open it, with little patience for silence."""
    monkeypatch.setattr(clients, "CONNECT_TIMEOUT", ANSWER_SECONDS)
    monkeypatch.setattr(clients, "READ_TIMEOUT", ANSWER_SECONDS)
    monkeypatch.setattr(sidecar, "PART_BYTES", PART)
    name = create_bucket(endpoint)
    with Proxy(endpoint) as proxy:
        async with S3Bucket.open(
            name, endpoint_url=proxy.url, workers=2, part_bytes=PART, tell=lambda _: None
        ) as bucket:
            await bucket.probe(".probe")
            yield Way(proxy, bucket, admin(endpoint))


async def hasty(seconds: float) -> None:
    """Sleep, but not so long."""
    await asyncio.sleep(seconds / HASTE)


async def _nothing_served() -> None:
    await asyncio.Event().wait()


class Probed(PatientBucket):
    """What it is able to do is known already: the probe is half of a job's requests, and hurt by itself."""

    async def probe(self, key: str) -> Abilities:
        """Say what was found before."""
        return self.abilities


class Job:
    """A node at work, on a prefix of its own; `leave` says what it finds, and what it does `run`."""

    def __init__(self, way: Way, root: Path) -> None:
        self.way = way
        self.prefix = way.cell()
        self.root = root / self.prefix
        self.root.mkdir()
        self.told = Told()
        self._at = {"Bucket": way.bucket.name}

    def key(self, name: str) -> dict[str, str]:
        """Return where an object is."""
        return {**self._at, "Key": self.prefix + name}

    def content(self, name: str) -> bytes:
        """Return the bytes of a checkpoint."""
        start = list(FILES).index(name)
        return LARGE[start : start + FILES[name]]

    def durable(self, name: str, id_: Id) -> Entry:
        """Have an object that is a checkpoint."""
        body = self.content(name)
        metadata = self_description(id_, BORN, len(body))
        etag = self.way.direct.put_object(**self.key(name), Body=body, Metadata=metadata)["ETag"]
        ref = ObjectRef(self.prefix + name, len(body), etag.strip('"'), encode_crc64(crc64(body)))
        return Entry(id_, name, (ref,), BORN, BORN)

    def leave(self) -> None:
        """Have what it finds."""
        raise NotImplementedError

    def work(self) -> None:
        """Do what it does once it is ready."""

    async def run(self) -> dict[str, Any]:
        """Live through it; return how it ended."""
        await asyncio.to_thread(self.leave)
        spool = opened_spool(self.root, name="spool-a")
        settings = Settings(
            watch=self.root,
            bucket=self.way.bucket.name,
            prefix=self.prefix,
            settle=0.0,
            rescan_every=3600.0,
            workers=2,
            drain_timeout=600.0,
            keep_remote=4,
        )
        told = self.told
        bucket = Probed(self.way.bucket, sleep=hasty, chance=lambda: 0.5, tell=told)
        me = holder("", "attempt-a", "node-a")
        world = World(bucket, replace(times(), sleep=hasty), lambda: time.monotonic() * HASTE, me, told)
        living = Sidecar(settings, world, spool=spool, book=Book())
        running = asyncio.create_task(living.run(_nothing_served))
        try:
            async with asyncio.timeout(300):
                while not (told.of(Ready) or running.done()):
                    await asyncio.sleep(0.01)
                self.work()
                living.stop.set()
                code = (await running).code
        finally:
            running.cancel()
            await asyncio.wait([running])
            spool.close()
        return {"code": int(code), **await asyncio.to_thread(self.end)}

    def end(self) -> dict[str, Any]:
        """Say how it has ended: the bucket, the watch dir, the spool, byte for byte."""
        client = self.way.direct
        found = client.list_objects_v2(**self._at, Prefix=self.prefix)["Contents"]
        bodies = {
            each["Key"].removeprefix(self.prefix): client.get_object(**self._at, Key=each["Key"])[
                "Body"
            ].read()
            for each in found
        }
        left = parse(bodies.pop("latest.json"), prefix=self.prefix)
        uploads = client.list_multipart_uploads(**self._at, Prefix=self.prefix).get("Uploads", [])
        return {
            "listed": [f"{each.id} {each.name}" for each in left.checkpoints],
            "announced": [each.name for each in left.uploads],
            "expiring": [each.key for each in left.expiring],
            "objects": {name: body == self.content(name) for name, body in bodies.items()},
            "uploads": [each["Key"] for each in uploads],
            "files": {
                path.name: path.read_bytes() == self.content(path.name)
                for path in self.root.iterdir()
                if path.is_file()
            },
            "pins": [path.name for path in (self.root / ".ckpt-sidecar" / "pins").rglob("*.pt")],
            "restored": [(each.outcome, each.name) for each in self.told.of(Restored)],
        }


class Sends(Job):
    """All that goes up, and what others have left.

    `old.pt` and `newest.pt` are durable. `lost.pt` is being uploaded by a spool that is gone. In our own
    spool `big.pt` has one part in the bucket; `doubt.pt` was created there, and we were killed before its id
    was written down. `saved.pt` is saved meanwhile. Four are kept, and so `old.pt` is deleted.
    """

    def leave(self) -> None:
        """Have what it finds."""
        lost = Announced(Id(3, 2), "lost.pt", self.prefix + "lost.pt", self._created("lost.pt"), 1, BORN, "z")
        left = Manifest(generation=3, holder=holder("spool-z", "attempt-z"), uploads=(lost,))
        for name, id_ in (("old.pt", Id(1, 1)), ("newest.pt", Id(3, 1))):
            left = committed(left, self.durable(name, id_))
        body = dump(left, bucket=self.way.bucket.name)
        self.way.direct.put_object(**self.key("latest.json"), Body=body)
        spool = opened_spool(self.root, generation=2)
        big = pin(spool, save(self.root, "big.pt", self.content("big.pt"), at=1))
        upload_id = self._created("big.pt", self_description(big.id, big.saved_at, big.size))
        part = {"PartNumber": 1, "Body": self.content("big.pt")[:PART]}
        self.way.direct.upload_part(**self.key("big.pt"), UploadId=upload_id, **part)
        spool.write(advance(big, Uploading((upload_id,))))
        doubt = pin(spool, save(self.root, "doubt.pt", self.content("doubt.pt"), at=2))
        spool.write(advance(doubt, Uploading((None,))))
        self._created("doubt.pt")
        spool.close()

    def _created(self, name: str, metadata: Mapping[str, str] = {}) -> str:
        answer = self.way.direct.create_multipart_upload(**self.key(name), Metadata=dict(metadata))
        return str(answer["UploadId"])

    def work(self) -> None:
        """Save."""
        save(self.root, "saved.pt", self.content("saved.pt"), at=3)


class Rebuilds(Job):
    """A new node finds no `latest.json`: it is made anew from the objects, and the newest is restored."""

    def leave(self) -> None:
        """Have what it finds."""
        self.durable("old.pt", Id(1, 1))
        self.durable("newest.pt", Id(3, 1))


# --- each request hurt in each way ----------------------------------------------------------------------

WRITES = {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}
WITH_REASONS = WRITES | {"GetObject", "ListParts", "ListMultipartUploads", "ListObjectsV2"}
IN_UPLOADS = {"UploadPart", "CompleteMultipartUpload", "ListParts"}
MADE = b"<CompleteMultipartUploadResult><ETag>%s</ETag></CompleteMultipartUploadResult>"
SKEWED = "<RequestTime>20260101T000000Z</RequestTime><ServerTime>2026-01-02T00:00:00Z</ServerTime>"


class Hurt(NamedTuple):
    """A way of hurting a request; `only` those of these operations can meet it."""

    fault: Fault
    only: Collection[str] = ()
    row: str = "C1"


HURTS = {
    "500": Hurt(Answer(500, "InternalError")),
    "502": Hurt(Answer(502, body=b"<html>Bad Gateway</html>")),
    "503": Hurt(Answer(503, "SlowDown")),
    "503, not even read": Hurt(Answer(503, "SlowDown", early=True)),
    "504": Hurt(Answer(504, body=b"")),
    "429": Hurt(Answer(429, "TooManyRequests", {"Retry-After": "7"})),
    "reset at once": Hurt(Broken("start"), row="C2"),
    "reset in the body": Hurt(Broken("body"), {"PutObject", "UploadPart"}, "C2"),
    "reset after the body": Hurt(Broken("end"), row="C2"),
    "hung up": Hurt(Broken("end", "closed"), row="C2"),
    "silent in the body": Hurt(Broken("body", "silent"), {"PutObject", "UploadPart"}, "C3"),
    "silent": Hurt(Broken("end", "silent"), row="C3"),
    "answer lost": Hurt(Broken("done"), row="C5"),
    "done, and 500": Hurt(Answer(500, "InternalError", done=True), row="C5"),
    "done, and silent": Hurt(Broken("done", "silent"), row="C5"),
    "200 with an error": Hurt(Answer(200, "InternalError"), {"CompleteMultipartUpload"}, "C6"),
    "done, 200 with an error": Hurt(
        Answer(200, "InternalError", done=True), {"CompleteMultipartUpload"}, "C6"
    ),
    "200, empty etag": Hurt(Answer(200, body=MADE % b""), {"CompleteMultipartUpload"}, "C6"),
    "done, empty etag": Hurt(Answer(200, body=MADE % b"", done=True), {"CompleteMultipartUpload"}, "C6"),
    "done, no etag": Hurt(Answer(200, body=b"", done=True), {"PutObject", "UploadPart"}, "C6"),
    "200, no etag": Hurt(Answer(200, body=b""), {"PutObject", "UploadPart"}, "C6"),
    "no such upload": Hurt(Answer(404, "NoSuchUpload"), IN_UPLOADS, "C7"),
    "aborted, no such upload": Hurt(Answer(404, "NoSuchUpload", done=True), {"AbortMultipartUpload"}, "C7"),
    "412": Hurt(
        Answer(412, "PreconditionFailed"), {"PutObject", "CompleteMultipartUpload", "GetObject"}, "C8"
    ),
    "409": Hurt(Answer(409, "ConditionalRequestConflict"), {*WRITES, "DeleteObject"}, "C8"),
    "done, and 412": Hurt(
        Answer(412, "PreconditionFailed", done=True), {"PutObject", "CompleteMultipartUpload"}, "C8"
    ),
    "damaged on its way up": Hurt(Damaged("up"), {"PutObject", "UploadPart"}, "C9"),
    "bad digest": Hurt(Answer(400, "BadDigest"), {"PutObject", "UploadPart"}, "C9"),
    "invalid part": Hurt(Answer(400, "InvalidPart"), {"CompleteMultipartUpload"}, "C10"),
    "invalid order": Hurt(Answer(400, "InvalidPartOrder"), {"CompleteMultipartUpload"}, "C10"),
    "too small": Hurt(Answer(400, "EntityTooSmall"), {"CompleteMultipartUpload"}, "C10"),
    "expired": Hurt(Answer(400, "ExpiredToken"), row="C11"),
    "denied": Hurt(Answer(403, "AccessDenied"), row="C12"),
    "skewed": Hurt(Answer(403, "RequestTimeTooSkewed", inside=SKEWED), row="C13"),
    "no bucket": Hurt(Answer(404, "NoSuchBucket"), WITH_REASONS, "C14"),
    "redirected": Hurt(Answer(301, "PermanentRedirect"), row="C14"),
    "full": Hurt(Answer(507, "InsufficientStorage"), WRITES, "C16"),
    "quota": Hurt(Answer(403, "QuotaExceeded"), WRITES, "C16"),
    "damaged on its way down": Hurt(Damaged("down"), {"GetObject"}, "F1"),
    "cut": Hurt(Broken("answer", "closed"), {"GetObject"}, "F3"),
    "reset in the answer": Hurt(Broken("answer"), {"GetObject"}, "F3"),
    "silent in the answer": Hurt(Broken("answer", "silent"), {"GetObject"}, "F3"),
    "200 and all of it": Hurt(Whole(), {"GetObject"}, "F3"),
}
ROWS = [pytest.param(name, marks=pytest.mark.fault(hurt.row), id=name) for name, hurt in HURTS.items()]
AT_ONCE = 4  # jobs, each with a prefix of its own
BRIEF = {  # these say for long what another on the list says, take long, or are rightly believed then
    *("502", "504", "503, not even read", "hung up", "200, empty etag", "200, no etag", "quota"),
    *("silent", "silent in the body", "done, and silent", "invalid order", "too small"),
    "damaged on its way down",
}
LASTING = [row for row in ROWS if row.id not in BRIEF]
LONG = 9  # times: the one retry gives up before


@dataclass(frozen=True)
class Asked:
    """A request that a job makes."""

    job: type[Job]
    operation: str
    name: str  # of the object; of a list nothing


@cache
def undisturbed() -> tuple[dict[type[Job], dict[str, Any]], list[Asked]]:
    """Where it is kept how the jobs end, and what they ask for, once they have run."""
    return {}, []


async def record(way: Way, root: Path) -> None:
    """Run the jobs undisturbed, and see what comes by."""
    ends, requests = undisturbed()
    for kind in (Sends, Rebuilds) if not ends else ():
        before = len(way.proxy.seen)
        job = kind(way, root)
        ends[kind] = await job.run()
        for seen in way.proxy.seen[before:]:
            asked = Asked(kind, seen.operation, seen.key.removeprefix(job.prefix))
            if seen.key.startswith(job.prefix) and asked not in requests:
                requests.append(asked)


async def hurt(way: Way, root: Path, requests: Sequence[Asked], *faults: Fault, times: int = 1) -> str:
    """Run the job with its requests hurt, each by its fault; say what is wrong with its end, or nothing."""
    if not requests:
        return ""
    job = requests[0].job(way, root)
    rules = [
        way.proxy.on(asked.operation, fault, key=job.prefix + asked.name, times=times)
        for asked, fault in zip(requests, cycle(faults), strict=False)
    ]
    what = f"{requests}: "
    try:
        end = await job.run()
    except Exception as error:  # noqa: BLE001 (it is said with all the others)
        return f"{what}{error!r}"
    finally:
        way.proxy.relent(*rules)
    if not any(rule.hits for rule in rules):
        return f"{what}it was never hurt"
    wanted = undisturbed()[0][requests[0].job]
    other = {name: (end[name], wanted[name]) for name in wanted if end[name] != wanted[name]}
    return f"{what}{other}" if other else ""


def meeting(name: str, *, checked: bool) -> list[Asked]:
    """Return the requests that can meet it, on a store where checksums are `checked`, or not.

    Where they are not, nobody can tell that a manifest was damaged on its way, if it still is one; nor an
    object that only a rebuilt manifest lists, which knows no checksum of it.
    One that is denied when it clears up after a killed predecessor is not repeated: there a role may never
    be allowed to, and the bucket's lifecycle rule clears up (test_who_may_not_list_uploads_still_uploads).
    """
    only = HURTS[name].only
    requests = [asked for asked in undisturbed()[1] if not only or asked.operation in only]
    clears_up = {"ListMultipartUploads", "ListParts", "AbortMultipartUpload"} if name == "denied" else ()
    blind = "damaged" in name and not checked
    return [
        each
        for each in requests
        if not (each.operation in clears_up and each.name == "doubt.pt")
        and not (blind and (each.name == "latest.json" or each.job is Rebuilds))
    ]


def skip_where_nobody_looks(there: Way, fault: Fault) -> None:
    """Skip the test where the store does not look at what it is sent."""
    if fault == Damaged("up") and not there.checked:
        pytest.skip("this store does not look at what it is sent")


@ON_ONE
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROWS)
async def test_a_request_that_is_hurt_once_changes_nothing(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each that the jobs make, for itself: the same end, byte for byte."""
    async with way(s3_endpoint, monkeypatch) as there:
        skip_where_nobody_looks(there, HURTS[name].fault)
        await record(there, tmp_path)
        some = asyncio.Semaphore(AT_ONCE)

        async def alone(asked: Asked) -> str:
            async with some:
                return await hurt(there, tmp_path, [asked], HURTS[name].fault)

        wrong = await asyncio.gather(*map(alone, meeting(name, checked=there.checked)))
    assert wrong
    assert not any(wrong), "\n".join(filter(None, wrong))


@ON_ONE
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LASTING)
async def test_an_operation_that_is_hurt_for_long_changes_nothing(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """More often in a row than it is repeated; all operations in one run.

    What retention could not delete before the end is left to the next life, and so not hurt.
    """
    often = 2 if "silent" in name else LONG
    async with way(s3_endpoint, monkeypatch) as there:
        skip_where_nobody_looks(there, HURTS[name].fault)
        await record(there, tmp_path)
        for kind in (Sends, Rebuilds):
            first = {
                each.operation: each
                for each in reversed(meeting(name, checked=there.checked))
                if each.job is kind
            }
            first.pop("DeleteObject", None)
            wrong = await hurt(there, tmp_path, list(first.values()), HURTS[name].fault, times=often)
            assert not wrong


@ON_ONE
@pytest.mark.fault("C1", "C2", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C16", "F3")
async def test_every_request_hurt_in_another_way_changes_nothing(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of the two above: in each run every request is hurt once, each in the next way on the list."""
    names = [name for name in HURTS if "silent" not in name and "up" not in name.split()]
    async with way(s3_endpoint, monkeypatch) as there:
        await record(there, tmp_path)
        for shift in (0, 11, 23):
            for kind in (Sends, Rebuilds):
                requests = [asked for asked in undisturbed()[1] if asked.job is kind]
                ways = [
                    next(
                        name
                        for name in names[n + shift :] + names
                        if asked in meeting(name, checked=there.checked)
                    )
                    for n, asked in enumerate(requests)
                ]
                faults = [HURTS[name].fault for name in ways]
                wrong = await hurt(there, tmp_path, requests, *faults)
                assert not wrong, list(zip(requests, ways, strict=True))


# --- operations that are never allowed ------------------------------------------------------------------

PERMISSIONS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "DeleteObject": "s3:DeleteObject",
}


@ON_ONE
@pytest.mark.long
@pytest.mark.fault("C12")
@pytest.mark.parametrize("operation", PERMISSIONS)
async def test_who_may_not_clear_up_still_makes_all_durable(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The permission that is missing is named; what is left is what it would have cleared up, no more."""
    async with way(s3_endpoint, monkeypatch) as there:
        await record(there, tmp_path)
        job = Sends(there, tmp_path)
        denied = [
            there.proxy.on(operation, Answer(403, "AccessDenied"), key=f"{job.prefix}{name}", times=FOR_LONG)
            for name in ("doubt.pt", "old.pt")  # to abort lost.pt is a duty: nothing begins without
        ]
        end = await job.run()
    wanted = undisturbed()[0][Sends]
    assert any(rule.hits for rule in denied)
    assert any(f"allow {PERMISSIONS[operation]}" in each.hint + each.error for each in job.told.of(Failed))
    assert {name: end[name] for name in ("listed", "files", "pins", "code", "announced")} == {
        name: wanted[name] for name in ("listed", "files", "pins", "code", "announced")
    }
    assert wanted["objects"].items() <= end["objects"].items()


# --- a slow way ------------------------------------------------------------------------------------------


@ON_ONE
@pytest.mark.long
@pytest.mark.fault("C4")
async def test_a_part_that_is_slow_but_alive_is_never_given_up(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timeouts are for silence: a part may take longer than any of them, up and down."""
    monkeypatch.setattr(clients, "CONNECT_TIMEOUT", 8.0)
    monkeypatch.setattr(clients, "READ_TIMEOUT", 8.0)
    size = 36 * MIB
    body = LARGE * -(-size // len(LARGE))
    name = create_bucket(s3_endpoint)
    admin(s3_endpoint).put_object(Bucket=name, Key="down", Body=body[:size])
    with Proxy(s3_endpoint) as proxy:
        proxy.on(EVERY, Slow(bytes_per_second=3 * MIB), times=FOR_LONG)
        async with S3Bucket.open(name, endpoint_url=proxy.url, workers=2, tell=lambda _: None) as bucket:
            ref = await bucket.head("down")
            assert ref is not None
            upload = Upload("up", await bucket.create_multipart("up", metadata={}))
            part, crc = await asyncio.gather(
                bucket.put_part(upload, Span(1, 0, size), BytesSource(body)),
                bucket.get_range(ref, Span(1, 0, size), BytesSink(size)),
            )
    seen = [each.operation for each in proxy.seen]
    assert part.crc64nvme == encode_crc64(crc)
    assert sorted(seen) == ["CreateMultipartUpload", "GetObject", "HeadObject", "UploadPart"]
