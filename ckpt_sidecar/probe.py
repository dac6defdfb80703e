"""Finds out what a store honours, by asking it for what it should refuse.

A condition is honoured when the wrong one is refused and the right one let through; a checksum is kept when
the wrong one is refused and the right one shown, for a single put and for an object made of parts. All of
it happens at one small key, which is left empty where deleting is allowed.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ckpt_sidecar.answers import bare, etag_of, version_of
from ckpt_sidecar.bucket import (
    Abilities,
    Absent,
    BucketError,
    Condition,
    Conflict,
    Corrupt,
    Denied,
    Missing,
    Refused,
    crc64,
    encode_crc64,
)

STALE = "0" * 32  # an etag that no object of ours ever had
PART = b"ckpt-sidecar probe, of one part"
FULL_OBJECT = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}  # of an upload's creation


class Ask(Protocol):
    """One request to the bucket; raises our six errors."""

    def __call__(self, operation: str, **arguments: Any) -> Awaitable[dict[str, Any]]:
        """Send it and return the store's answer."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How the store takes a condition on one verb; before the probe nothing is relied upon."""

    honoured: bool = False
    sent: bool = True  # False where the store refuses whatever carries one
    quoted: bool = True  # how it wants an etag: as HTTP has it, or bare (Ceph)

    def headers(self, when: Condition) -> dict[str, str]:
        """Return the condition as the store wants it."""
        if not self.sent:
            return {}
        if isinstance(when, Absent):
            return {"IfNoneMatch": "*"}
        return _if_match(when.etag, quoted=self.quoted)


@dataclass(frozen=True, slots=True)
class Manners:
    """What the probe saw. `declared`: a put may carry a CRC64NVME; `checksum`: it is enforced and kept."""

    put: Manner = Manner()
    complete: Manner = Manner()
    delete: Manner = Manner()
    declared: bool = True
    checksum: bool = False

    @property
    def abilities(self) -> Abilities:
        """The same, as the rest of the program wants to know it."""
        return Abilities(self.put.honoured, self.complete.honoured, self.delete.honoured, self.checksum)


async def probe(ask: Ask, key: str) -> Manners:
    """Probe the store at `key`: about 17 small requests, and one for each version that is to be removed.

    Two probes of one key at a time disturb each other. Raises what `ask` raises where no answer was foreseen.
    """
    visit = _Visit(ask, key)
    await visit.arrive()
    try:
        put = await visit.puts()
        kept = await visit.keeps_a_put()
        complete = await visit.completes(put)
        kept = kept and await visit.keeps_an_upload()
        delete = await visit.deletes(put)
    finally:
        await visit.leave()
    return Manners(put, complete, delete, declared=visit.declared, checksum=kept)


@dataclass(slots=True)
class _Visit:
    """One probing: what stands at the key now, what was found on the way, what is to be removed."""

    ask: Ask
    key: str
    body: bytes = b""
    etag: str = ""
    upload_id: str = ""
    part_etag: str = ""
    declared: bool = True
    part_checked: bool = False
    full_object: bool = True
    versions: list[str] = field(default_factory=list)

    # --- what is asked ---

    async def arrive(self) -> None:
        """Throw away the upload of a probe that was killed; where that is not allowed it stays."""
        with suppress(BucketError):
            found = await self.ask("list_multipart_uploads", Prefix=self.key)
            for each in found.get("Uploads", ()):
                if each["Key"] == self.key:
                    await self.ask("abort_multipart_upload", Key=self.key, UploadId=each["UploadId"])

    async def puts(self) -> Manner:
        """See what conditions do on a put."""
        if await self._put(b"1") == "refused":
            self.declared = False
            await self._do("put_object", Body=bytearray(b"1"))
        absent = await self._put(b"2", IfNoneMatch="*")
        stale = await self._put(b"3", **_if_match(STALE, quoted=True))
        quoted = await self._put(b"4", **_if_match(self.etag, quoted=True)) == "done"
        right = quoted or await self._put(b"5", **_if_match(self.etag, quoted=False)) == "done"
        return Manner(absent == stale == "conflict" and right, sent=right, quoted=quoted or not right)

    async def keeps_a_put(self) -> bool:
        """See whether the checksum of a put is enforced and shown."""
        shown = await self._shows(self.body)
        return shown and await self._put(b"6", ChecksumCRC64NVME=_crc(b"wrong")) == "corrupt"

    async def completes(self, put: Manner) -> Manner:
        """See what conditions do on a complete; the last one makes the object."""
        absent = await self._complete(IfNoneMatch="*")
        stale = await self._complete(**_if_match(STALE, quoted=put.quoted))
        right = await self._complete(**_if_match(self.etag, quoted=put.quoted)) == "done"
        return Manner(absent == stale == "conflict" and right, sent=right, quoted=put.quoted)

    async def keeps_an_upload(self) -> bool:
        """See whether a part's checksum was enforced, and the whole object's is shown."""
        return self.part_checked and await self._shows(PART)

    async def deletes(self, put: Manner) -> Manner:
        """See what a condition does on a delete."""
        stale = await self._delete(**_if_match(STALE, quoted=put.quoted))
        if stale != "conflict":
            return Manner(sent=stale == "done", quoted=put.quoted)
        right = await self._delete(**_if_match(self.etag, quoted=put.quoted)) == "done"
        return Manner(right, sent=right, quoted=put.quoted)

    async def leave(self) -> None:
        """Clean up as far as that is allowed; what stays is small, and the next probe writes over it."""
        with suppress(BucketError):
            if self.upload_id:
                await self._do("abort_multipart_upload", UploadId=self.upload_id)
        with suppress(BucketError):
            await self._delete()
            for version in tuple(self.versions):
                await self._do("delete_object", VersionId=version)

    # --- how it is asked ---

    async def _put(self, body: bytes, **extra: Any) -> str:
        checks = {"ChecksumCRC64NVME": _crc(body)} if self.declared else {}
        outcome = await self._tried("put_object", Body=bytearray(body), **(checks | extra))
        self.body = body if outcome == "done" else self.body
        return outcome

    async def _complete(self, **extra: Any) -> str:
        """Complete an upload of one part; one that an earlier refusal has used up is made anew."""
        if not self.upload_id:
            await self._begin()
        outcome = await self._complete_once(**extra)
        if outcome == "missing":
            await self._begin()
            outcome = await self._complete_once(**extra)
        return outcome

    async def _complete_once(self, **extra: Any) -> str:
        part = {"PartNumber": 1, "ETag": self.part_etag}
        if self.full_object:
            part |= {"ChecksumCRC64NVME": _crc(PART)}
            extra |= {
                "ChecksumType": "FULL_OBJECT",
                "ChecksumCRC64NVME": _crc(PART),
                "MpuObjectSize": len(PART),
            }
        outcome = await self._tried(
            "complete_multipart_upload", UploadId=self.upload_id, MultipartUpload={"Parts": [part]}, **extra
        )
        if outcome in ("done", "missing"):
            self.upload_id = ""
        return outcome

    async def _begin(self) -> None:
        """Begin an upload and send its part: first with a wrong checksum, then as it should be."""
        self.full_object = self.full_object and self.declared
        if self.full_object and await self._tried("create_multipart_upload", **FULL_OBJECT) == "refused":
            self.full_object = False
        if not self.full_object:
            await self._do("create_multipart_upload")
        part = {"UploadId": self.upload_id, "PartNumber": 1, "Body": bytearray(PART)}
        checks = {}
        if self.full_object:
            wrong = await self._tried("upload_part", **part, ChecksumCRC64NVME=_crc(b"wrong"))
            self.part_checked = wrong == "corrupt"
            checks = {"ChecksumCRC64NVME": _crc(PART)}
        self.part_etag = etag_of(await self._do("upload_part", **part, **checks), self.key)

    async def _delete(self, **extra: Any) -> str:
        try:
            return await self._tried("delete_object", **extra)
        except Denied:
            return "denied"

    async def _shows(self, body: bytes) -> bool:
        seen = await self._do("head_object", ChecksumMode="ENABLED")
        kind = seen.get("ChecksumType", "FULL_OBJECT")
        return seen.get("ChecksumCRC64NVME") == _crc(body) and kind == "FULL_OBJECT"

    async def _tried(self, operation: str, **arguments: Any) -> str:
        """Say how it went: done, conflict, corrupt, refused or missing."""
        try:
            await self._do(operation, **arguments)
        except (Conflict, Corrupt, Refused, Missing) as error:
            if error.reason in ("bucket", "region"):
                raise
            return type(error).__name__.lower()
        return "done"

    async def _do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        answer = await self.ask(operation, Key=self.key, **arguments)
        if operation in ("put_object", "complete_multipart_upload"):
            self.etag = bare(answer.get("ETag", ""))
        self.upload_id = answer.get("UploadId", self.upload_id)
        version = version_of(answer)
        if version and "VersionId" not in arguments and operation != "head_object":
            self.versions.append(version)
        return answer


def _if_match(etag: str, *, quoted: bool) -> dict[str, str]:
    return {"IfMatch": f'"{etag}"' if quoted else etag}


def _crc(body: bytes) -> str:
    return encode_crc64(crc64(body))
