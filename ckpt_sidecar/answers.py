"""What S3's answers mean, above all its refusals: code, status or exception's class as one of our six errors.

botocore's classes are known here by name, so that nothing heavy is imported. Nothing that a request was
signed with gets into a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from traceback import walk_tb
from typing import Any

from ckpt_sidecar.bucket import BucketError, Conflict, Corrupt, Denied, Missing, Refused, Unreachable

MAX_TEXT = 300  # characters of a store's own words; a proxy may answer with a whole page


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of the store; `operation` is S3's word in snake case, `key` may be empty.

    `owner` is the account that the bucket was said to be of, if one was.
    """

    operation: str
    bucket: str
    key: str = ""
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.operation} s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class Meaning:
    """One row of the table. The hint may name {bucket} and {permission}."""

    kind: type[BucketError]
    reason: str
    hint: str = ""


_KEY = Meaning(Missing, "key")
_BUCKET = Meaning(
    Missing, "bucket", "check the name, the region and the endpoint: there is no bucket {bucket!r}"
)
_UPLOAD = Meaning(Missing, "upload")
_CONFLICT = Meaning(Conflict, "conflict")
_DENIED = Meaning(Denied, "denied", "allow {permission} on {bucket}")
_KMS = Meaning(Denied, "denied", "allow kms:GenerateDataKey and kms:Decrypt on the bucket's KMS key, enabled")
_CREDENTIALS = Meaning(
    Denied, "credentials", "check the credentials that the AWS chain finds (aws sts get-caller-identity)"
)
_CLOCK = Meaning(Unreachable, "clock", "set this machine's clock (NTP)")
_REGION = Meaning(Refused, "region", "set AWS_REGION to the bucket's region")
_THROTTLED = Meaning(Unreachable, "throttled")
_SERVER = Meaning(Unreachable, "server")
_TIMEOUT = Meaning(Unreachable, "timeout")
_CONNECTION = Meaning(Unreachable, "connection", "check the endpoint, DNS and the way to it")
_CORRUPT = Meaning(Corrupt, "checksum")
_REFUSED = Meaning(Refused, "refused")
_PARTS = Meaning(Refused, "refused", "list the parts and send again those that are not as they should be")
_ARCHIVED = Meaning(Refused, "refused", "it is archived: restore it to a storage class that can be read")
_FULL = Meaning(Refused, "refused", "the store is full or its quota used up: make room")
_CERTIFICATE = Meaning(Refused, "refused", "the store's certificate is not trusted: set AWS_CA_BUNDLE")
_CONFIG = Meaning(Refused, "refused", "check the AWS configuration (profile, endpoint, bucket name)")

CODES: Mapping[str, Meaning] = {
    "NoSuchKey": _KEY,
    "NoSuchVersion": _KEY,
    "NotFound": _KEY,
    "NoSuchBucket": _BUCKET,
    "NoSuchUpload": _UPLOAD,
    "PreconditionFailed": _CONFLICT,
    "ConditionalRequestConflict": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "UserSuspended": _DENIED,
    "ExpiredToken": _CREDENTIALS,
    "ExpiredTokenException": _CREDENTIALS,
    "TokenRefreshRequired": _CREDENTIALS,
    "RequestExpired": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "InvalidClientTokenId": _CREDENTIALS,
    "UnrecognizedClientException": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidSecurity": _CREDENTIALS,
    "NotSignedUp": _CREDENTIALS,
    "400": _CREDENTIALS,  # HEAD has no body to say why: expired credentials are the usual cause
    "RequestTimeTooSkewed": _CLOCK,
    "RequestInTheFuture": _CLOCK,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "SlowDown": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottlingException": _THROTTLED,
    "RequestThrottled": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "BandwidthLimitExceeded": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "ServiceUnavailable": _THROTTLED,
    "InternalError": _SERVER,
    "RequestTimeout": _TIMEOUT,
    "RequestTimeoutException": _TIMEOUT,
    "BadDigest": _CORRUPT,
    "InvalidDigest": _CORRUPT,
    "XAmzContentChecksumMismatch": _CORRUPT,
    "XAmzContentSHA256Mismatch": _CORRUPT,
    "IncompleteBody": _CORRUPT,
    "InvalidRange": _CORRUPT,  # the object is shorter than it should be
    "InvalidPart": _PARTS,
    "InvalidPartOrder": _PARTS,
    "EntityTooSmall": _PARTS,
    "InvalidObjectState": _ARCHIVED,
    "QuotaExceeded": _FULL,
    "StorageFull": _FULL,
    "XMinioStorageFull": _FULL,
}

STATUSES: Mapping[int, Meaning] = {
    301: _REGION,
    307: _REGION,
    308: _REGION,
    401: _CREDENTIALS,
    403: _DENIED,
    404: _KEY,
    408: _TIMEOUT,
    409: _CONFLICT,
    412: _CONFLICT,
    416: _CORRUPT,
    429: _THROTTLED,
    501: _REFUSED,
    503: _THROTTLED,
    507: _FULL,
}

# In the order of an exception's classes, the nearest first; all botocore's but the last three.
CLASSES: Mapping[str, Meaning] = {
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "TokenRetrievalError": _CREDENTIALS,
    "NoAuthTokenError": _CREDENTIALS,
    "SSOError": _CREDENTIALS,
    "ConnectTimeoutError": _TIMEOUT,
    "ReadTimeoutError": _TIMEOUT,
    "ConnectionError": _CONNECTION,
    "ConnectionClosedError": _CONNECTION,
    "HTTPClientError": _CONNECTION,
    "ResponseStreamingError": _CONNECTION,
    "IncompleteReadError": _CONNECTION,
    "ResponseParserError": _SERVER,
    "BotoCoreError": _CONFIG,
    "ServerTimeoutError": _TIMEOUT,  # aiohttp's, while a body is read
    "ClientError": _CONNECTION,  # aiohttp's too; botocore's has its own way above
    "HTTPError": _CONNECTION,  # urllib3's, while a body is read (TLS)
}
# Some of these are OSErrors as well, so only where it was made tells a store's silence from a disk's.
LIBRARIES = frozenset({"aiobotocore", "aiohttp", "botocore", "urllib3"})

CHAIN = frozenset({"aiobotocore.credentials", "botocore.credentials"})

PERMISSIONS: Mapping[str, str] = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_parts": "s3:ListMultipartUploadParts",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_objects_v2": "s3:ListBucket",
    "delete_object": "s3:DeleteObject (and s3:DeleteObjectVersion where the bucket is versioned)",
    "head_object": "s3:GetObject and s3:ListBucket (without it a missing key is answered with 403)",
    "get_object": "s3:GetObject (where the bucket is versioned s3:GetObjectVersion too) and s3:ListBucket "
    "(without it a missing key is answered with 403)",
}

_OF_AN_UPLOAD = frozenset({"upload_part", "list_parts", "abort_multipart_upload"})
_CONDITIONAL = frozenset({"put_object", "complete_multipart_upload"})


def bare(etag: str) -> str:
    """Return an etag without quotes, however the store wrote it."""
    return etag.removeprefix("W/").strip('"')


def etag_of(answer: Mapping[str, Any], key: str) -> str:
    """Return the etag that an answer shows; without one it says nothing about the object."""
    etag = bare(answer.get("ETag") or "")
    if not etag:
        raise Unreachable(f"{key}: the store's answer has no etag", reason="server")
    return etag


def version_of(answer: Mapping[str, Any]) -> str | None:
    """Return the version that an answer names; None where the bucket is not versioned."""
    version = answer.get("VersionId")
    return None if version in (None, "null") else str(version)


def translated(error: Exception, asked: Asked) -> Exception:
    """Return the error as one of our six, or as it is when it is none of the store's (a disk's, a bug)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _answered(response, asked)
    for kind in type(error).__mro__:
        if kind.__module__.partition(".")[0] in LIBRARIES and kind.__name__ in CLASSES:
            return _unanswered(error, CLASSES[kind.__name__], asked)
    return _unanswered(error, _CREDENTIALS, asked) if _of_the_chain(error) else error


def _of_the_chain(error: Exception) -> bool:
    """Was it raised where the AWS chain looks for credentials? It lets out whatever went wrong there."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "") in CHAIN for frame in frames)


def _answered(response: Mapping[str, Any], asked: Asked) -> BucketError:
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(meta.get("HTTPStatusCode", 0))
    meaning = _for_operation(_meaning(code, status), asked.operation)
    said = scrubbed(": ".join(filter(None, (code, str(error.get("Message") or "")))))
    if meaning is _CLOCK and error.get("ServerTime"):
        said += f"; the store's clock says {error['ServerTime']}, ours said {error.get('RequestTime')}"
    raised = _made(meaning, f"{asked}: {said or status}", asked, region=_region(response))
    if isinstance(raised, Unreachable):
        raised.retry_after = _retry_after(meta.get("HTTPHeaders", {}))
    return raised


def _unanswered(error: Exception, meaning: Meaning, asked: Asked) -> BucketError:
    text = scrubbed(str(error)) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        meaning = _CERTIFICATE
    return _made(meaning, f"{asked}: {text}", asked)


def _meaning(code: str, status: int) -> Meaning:
    found = CODES.get(code) or STATUSES.get(status)
    if code.startswith("KMS."):
        found = _KMS
    return found or (_SERVER if status >= 500 or status == 200 else _REFUSED)


def _for_operation(meaning: Meaning, operation: str) -> Meaning:
    """A missing key means another thing where an upload is named (Ceph), and under `If-Match`."""
    if meaning is _KEY and operation in _OF_AN_UPLOAD:
        return _UPLOAD
    if meaning is _KEY and operation in _CONDITIONAL:
        return _CONFLICT
    return meaning


def _made(meaning: Meaning, text: str, asked: Asked, *, region: str = "") -> BucketError:
    permission = PERMISSIONS.get(asked.operation, "it")
    hint = meaning.hint.format(bucket=asked.bucket, permission=permission)
    if meaning is _DENIED and asked.owner:
        hint += f", or correct --expected-bucket-owner if it is not {asked.owner}'s"
    if meaning is _REGION and region:
        hint = f"the bucket is in {region}: set AWS_REGION={region}"
    return meaning.kind(text, hint=hint, reason=meaning.reason)


def _region(response: Mapping[str, Any]) -> str:
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or "")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, also where the store names a date; its own clock counts then. 0 when it does not ask."""
    asked = headers.get("retry-after", "")
    try:
        if not asked or asked.isdecimal():
            return float(asked or 0)
        seconds = parsedate_to_datetime(asked) - parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return 0.0
    return max(0.0, seconds.total_seconds())


_SECRETS = (
    (re.compile(r"(?<=//)[^/\s]+@"), ""),  # user:password@ in an endpoint
    (re.compile(r"\?[^\s\"'>]*"), ""),  # the query: presigned signatures and tokens
    (re.compile(r"(?i)(authorization|signature|credential|security-token)([\"']?\s*[:=]\s*).+"), r"\1\2..."),
)


def scrubbed(text: str) -> str:
    """Return the text on one line, without what a request was signed with, and not longer than need be."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    text = " ".join(text.split())
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
