"""What a store's refusal means, as a table; and that no secret gets into what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from aiobotocore.response import AioReadTimeoutError
from botocore import exceptions as botocore
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import exceptions as urllib3

from ckpt_sidecar.answers import (
    CODES,
    MAX_TEXT,
    PERMISSIONS,
    STATUSES,
    Asked,
    bare,
    scrubbed,
    translated,
    version_of,
)
from ckpt_sidecar.bucket import BucketError, Conflict, Corrupt, Denied, Missing, Refused, Unreachable
from ckpt_sidecar.labels import LABELS

GET = Asked("get_object", "training", "job/a b.pt")


def answered(
    code: str = "",
    status: int = 400,
    *,
    operation: str = "get_object",
    message: str = "",
    headers: Mapping[str, str] | None = None,
    **more: str,
) -> BucketError:
    """Return what an answer of the store becomes."""
    response: dict[str, Any] = {
        "Error": {"Code": code, "Message": message, **more},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers or {}},
    }
    error = translated(botocore.ClientError(response, "GetObject"), Asked(operation, "training", "x"))
    assert isinstance(error, BucketError)
    return error


# --- codes and statuses -------------------------------------------------------------------------------


@pytest.mark.fault("C1", "C12", "C14", "C16")
@pytest.mark.parametrize(
    ("code", "status", "kind", "reason", "hint"),
    [
        # There is no such thing.
        ("NoSuchKey", 404, Missing, "key", ""),
        ("NoSuchVersion", 404, Missing, "key", ""),
        ("404", 404, Missing, "key", ""),
        ("NoSuchBucket", 404, Missing, "bucket", "there is no bucket 'training'"),
        ("NoSuchUpload", 404, Missing, "upload", ""),
        # A condition did not hold.
        ("PreconditionFailed", 412, Conflict, "conflict", ""),
        ("412", 412, Conflict, "conflict", ""),
        ("ConditionalRequestConflict", 409, Conflict, "conflict", ""),
        ("OperationAborted", 409, Conflict, "conflict", ""),
        ("SomethingNew", 409, Conflict, "conflict", ""),
        # Not allowed.
        ("AccessDenied", 403, Denied, "denied", "allow s3:GetObject"),
        ("403", 403, Denied, "denied", "allow s3:GetObject"),
        ("KMS.DisabledException", 400, Denied, "denied", "kms:Decrypt"),
        ("KMS.SomethingNew", 400, Denied, "denied", "KMS key"),
        ("ExpiredToken", 400, Denied, "credentials", "aws sts get-caller-identity"),
        ("InvalidAccessKeyId", 403, Denied, "credentials", "check the credentials"),
        ("SignatureDoesNotMatch", 403, Denied, "credentials", "check the credentials"),
        ("401", 401, Denied, "credentials", "check the credentials"),
        ("400", 400, Denied, "credentials", "check the credentials"),
        # No answer that says what happened.
        ("SlowDown", 503, Unreachable, "throttled", ""),
        ("ServiceUnavailable", 503, Unreachable, "throttled", ""),
        ("TooManyRequests", 429, Unreachable, "throttled", ""),
        ("429", 429, Unreachable, "throttled", ""),
        ("503", 503, Unreachable, "throttled", ""),
        ("InternalError", 500, Unreachable, "server", ""),
        ("InternalError", 200, Unreachable, "server", ""),
        ("UnknownError", 500, Unreachable, "server", ""),
        ("SomethingNew", 599, Unreachable, "server", ""),
        ("502", 502, Unreachable, "server", ""),
        ("504", 504, Unreachable, "server", ""),
        ("", 200, Unreachable, "server", ""),
        ("RequestTimeout", 400, Unreachable, "timeout", ""),
        ("408", 408, Unreachable, "timeout", ""),
        ("RequestTimeTooSkewed", 403, Unreachable, "clock", "NTP"),
        # Bytes and checksum disagree.
        ("BadDigest", 400, Corrupt, "checksum", ""),
        ("XAmzContentChecksumMismatch", 400, Corrupt, "checksum", ""),
        ("IncompleteBody", 400, Corrupt, "checksum", ""),
        ("InvalidRange", 416, Corrupt, "checksum", ""),
        ("416", 416, Corrupt, "checksum", ""),
        # It will not do this.
        ("InvalidPart", 400, Refused, "refused", "send again"),
        ("InvalidPartOrder", 400, Refused, "refused", "send again"),
        ("EntityTooSmall", 400, Refused, "refused", "send again"),
        ("InvalidObjectState", 403, Refused, "refused", "restore it to a storage class"),
        ("QuotaExceeded", 403, Refused, "refused", "make room"),
        ("507", 507, Refused, "refused", "make room"),
        ("NotImplemented", 501, Refused, "refused", ""),
        ("InvalidArgument", 400, Refused, "refused", ""),
        ("SomethingNew", 405, Refused, "refused", ""),
        ("PermanentRedirect", 301, Refused, "region", "set AWS_REGION"),
        ("AuthorizationHeaderMalformed", 400, Refused, "region", "set AWS_REGION"),
        ("307", 307, Refused, "region", "set AWS_REGION"),
    ],
)
def test_an_answer_becomes_what_one_can_do_about_it(
    code: str, status: int, kind: type[BucketError], reason: str, hint: str
) -> None:
    """By its code, else by its status; with the mend where there is one."""
    error = answered(code, status)
    assert (type(error), error.reason) == (kind, reason)
    assert hint in error.hint
    assert bool(hint) == bool(error.hint)


@pytest.mark.parametrize("code", [*CODES, *(str(status) for status in STATUSES)])
def test_every_row_makes_an_error_that_names_what_was_asked(code: str) -> None:
    """And leaves no gap in its hint."""
    error = answered(code, int(code) if code.isdecimal() else 418, message="as it says")
    assert str(error).startswith("get_object s3://training/x: ")
    assert code in str(error)
    assert "as it says" in str(error)
    assert "{" not in str(error)


def test_every_reason_to_try_again_has_a_label() -> None:
    """So that it is counted under its own name."""
    reasons = {
        meaning.reason for meaning in (*CODES.values(), *STATUSES.values()) if meaning.kind is Unreachable
    }
    assert reasons <= set(LABELS["retry_reason"])


@pytest.mark.parametrize(
    ("operation", "kind", "reason"),
    [
        ("get_object", Missing, "key"),
        ("head_object", Missing, "key"),
        ("delete_object", Missing, "key"),
        ("upload_part", Missing, "upload"),
        ("list_parts", Missing, "upload"),
        ("abort_multipart_upload", Missing, "upload"),
        ("put_object", Conflict, "conflict"),
        ("complete_multipart_upload", Conflict, "conflict"),
    ],
)
@pytest.mark.parametrize("code", ["NoSuchKey", "404", "NotFound"])
def test_what_is_missing_depends_on_what_was_asked(
    operation: str, kind: type[BucketError], reason: str, code: str
) -> None:
    """Where an upload is named it is that; under `If-Match` the condition did not hold."""
    error = answered(code, 404, operation=operation)
    assert (type(error), error.reason) == (kind, reason)


@pytest.mark.parametrize(
    "operation", ["put_object", "complete_multipart_upload", "list_parts", "head_object"]
)
def test_a_bucket_that_is_missing_is_that_whatever_was_asked(operation: str) -> None:
    """A mistake of the settings, never a conflict."""
    error = answered("NoSuchBucket", 404, operation=operation)
    assert (type(error), error.reason) == (Missing, "bucket")


@pytest.mark.fault("C12")
@pytest.mark.parametrize("operation", sorted(set(LABELS["operation"]) - {"other"}))
def test_a_denial_names_the_permission_that_it_takes(operation: str) -> None:
    """For every operation that there is."""
    error = answered("AccessDenied", 403, operation=operation)
    assert error.hint == f"allow {PERMISSIONS[operation]} on training"
    assert "s3:" in error.hint


@pytest.mark.fault("C14")
@pytest.mark.parametrize(
    ("headers", "more"), [({"x-amz-bucket-region": "eu-north-1"}, {}), ({}, {"Region": "eu-north-1"})]
)
def test_the_right_region_is_said_where_the_store_says_it(
    headers: dict[str, str], more: dict[str, str]
) -> None:
    """In a header, or in the error itself."""
    error = answered("AuthorizationHeaderMalformed", 400, headers=headers, **more)
    assert error.hint == "the bucket is in eu-north-1: set AWS_REGION=eu-north-1"


@pytest.mark.fault("C13")
def test_a_wrong_clock_is_told_with_both_times() -> None:
    """The store's, and ours."""
    error = answered(
        "RequestTimeTooSkewed", 403, ServerTime="2026-11-24T17:00:00Z", RequestTime="20261124T150000Z"
    )
    assert "the store's clock says 2026-11-24T17:00:00Z, ours said 20261124T150000Z" in str(error)


DATE = "Tue, 24 Nov 2026 17:00:00 GMT"


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Tue, 24 Nov 2026 17:01:30 GMT", "date": DATE}, 90.0),
        ({"retry-after": "Tue, 24 Nov 2026 18:01:30 +0100", "date": DATE}, 90.0),
        ({"retry-after": "Tue, 24 Nov 2026 16:59:00 GMT", "date": DATE}, 0.0),
        ({"retry-after": "Tue, 24 Nov 2026 17:01:30 GMT"}, 0.0),
        ({"retry-after": "Tue, 24 Nov 2026 17:01:30 -0000", "date": DATE}, 0.0),
        ({"retry-after": "Tue, 24 Nov 2026 17:01:30 GMT", "date": "today"}, 0.0),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "7.5"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
    ],
)
def test_a_store_says_when_to_come_back(headers: dict[str, str], seconds: float) -> None:
    """In seconds or as a date by its own clock; what cannot be read asks for nothing."""
    error = answered("SlowDown", 503, headers=headers)
    assert isinstance(error, Unreachable)
    assert error.retry_after == seconds


# --- no answer ----------------------------------------------------------------------------------------

URL = "https://user:hidden@s3.example/training/x?X-Amz-Signature=hidden"


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (botocore.NoCredentialsError(), Denied, "credentials"),
        (botocore.PartialCredentialsError(provider="env", cred_var="secret"), Denied, "credentials"),
        (botocore.CredentialRetrievalError(provider="x", error_msg="y"), Denied, "credentials"),
        (botocore.TokenRetrievalError(provider="x", error_msg="y"), Denied, "credentials"),
        (botocore.UnauthorizedSSOTokenError(), Denied, "credentials"),
        (botocore.ConnectTimeoutError(endpoint_url=URL), Unreachable, "timeout"),
        (botocore.ReadTimeoutError(endpoint_url=URL), Unreachable, "timeout"),
        (AioReadTimeoutError(endpoint_url=URL), Unreachable, "timeout"),
        (aiohttp.SocketTimeoutError(URL), Unreachable, "timeout"),
        (botocore.EndpointConnectionError(endpoint_url=URL), Unreachable, "connection"),
        (botocore.ConnectionClosedError(endpoint_url=URL), Unreachable, "connection"),
        (botocore.ProxyConnectionError(proxy_url=URL), Unreachable, "connection"),
        (botocore.SSLError(endpoint_url=URL, error="bad record"), Unreachable, "connection"),
        (botocore.HTTPClientError(error=URL), Unreachable, "connection"),
        (botocore.ResponseStreamingError(error=URL), Unreachable, "connection"),
        (botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2), Unreachable, "connection"),
        (aiohttp.ClientPayloadError(URL), Unreachable, "connection"),
        (aiohttp.ClientOSError(104, URL), Unreachable, "connection"),
        (aiohttp.ServerDisconnectedError(URL), Unreachable, "connection"),
        (urllib3.SSLError(URL), Unreachable, "connection"),
        (botocore.SSLError(endpoint_url=URL, error="CERTIFICATE_VERIFY_FAILED"), Refused, "refused"),
        (botocore.ProfileNotFound(profile="x"), Refused, "refused"),
        (botocore.ParamValidationError(report=URL), Refused, "refused"),
        (botocore.NoRegionError(), Refused, "refused"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_the_libraries_is_the_stores_silence(
    error: Exception, kind: type[BucketError], reason: str
) -> None:
    """Also those that are OSErrors; nothing of the endpoint's secrets is in it."""
    found = translated(error, GET)
    assert isinstance(found, BucketError)
    assert (type(found), found.reason) == (kind, reason)
    assert str(found).startswith("get_object s3://training/job/a b.pt: ")
    assert "hidden" not in str(found)
    assert found.hint or reason in ("timeout", "server")


@pytest.mark.fault("C20")
def test_a_certificate_that_is_not_trusted_is_told_with_the_mend() -> None:
    """Waiting would not help."""
    error = botocore.SSLError(endpoint_url=URL, error="certificate verify failed: unable to get local issuer")
    found = translated(error, GET)
    assert isinstance(found, Refused)
    assert "AWS_CA_BUNDLE" in found.hint


@pytest.mark.fault("C11")
@pytest.mark.parametrize("error", [ValueError("Expecting value"), RuntimeError("still expired")])
def test_whatever_the_chain_of_credentials_raises_is_no_bug_of_ours(error: Exception) -> None:
    """A credential_process that prints nonsense, or what has expired: said, and asked again later."""
    found: dict[str, Any] = {"__name__": "botocore.credentials"}
    exec("def refresh(error): raise error", found)  # noqa: S102 (as if it stood in that module)
    with pytest.raises(type(error)) as caught:
        found["refresh"](error)
    raised = translated(caught.value, Asked("put_object", "bucket", "x.pt"))
    assert isinstance(raised, Denied)
    assert raised.reason == "credentials"
    assert str(error) in str(raised)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        TimeoutError(110, "Connection timed out"),  # a disk's, over NFS
        ConnectionResetError(104, "Connection reset by peer"),
        KeyError("ETag"),
        Corrupt("the source came short"),
        Unreachable("as told before", reason="server"),
    ],
)
def test_what_is_not_the_stores_stays_as_it_is(error: Exception) -> None:
    """A disk's error, a bug, and what is one of ours already."""
    assert translated(error, GET) is error


# --- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ""),
        ("nothing to hide", "nothing to hide"),
        ("two\n  lines\tand a tab\r\n", "two lines and a tab"),
        ("http://user:hidden@host:9000/x", "http://host:9000/x"),
        ("http://user:hid@den@host/x", "http://host/x"),
        ("http://hidden@host", "http://host"),
        ("see https://host/a@b.pt", "see https://host/a@b.pt"),
        ('"https://host/x?X-Amz-Signature=hidden&b=c" failed', '"https://host/x" failed'),
        ("GET /x?partNumber=1&uploadId=hidden HTTP/1.1", "GET /x HTTP/1.1"),
        ("Authorization: AWS4-HMAC-SHA256 hidden", "Authorization: ..."),
        ("'X-Amz-Security-Token': 'hidden'", "'X-Amz-Security-Token': ..."),
        ("x-amz-security-token = hidden", "x-amz-security-token = ..."),
        ("Signature=hidden, more hidden", "Signature=..."),
        ("Authorization:\n hidden\n", "Authorization: ..."),
        (
            "The request signature we calculated does not match",
            "The request signature we calculated does not match",
        ),
    ],
)
def test_what_a_request_was_signed_with_is_not_told(text: str, told: str) -> None:
    """Neither user and password, nor a query, nor a signature; on one line."""
    assert scrubbed(text) == told


@given(st.text(max_size=3 * MAX_TEXT))
def test_whatever_a_store_says_is_one_short_line(text: str) -> None:
    """However long or wild it is."""
    told = scrubbed(text)
    assert len(told) <= MAX_TEXT + len("...")
    assert len(told.splitlines()) <= 1


@pytest.mark.parametrize(
    ("etag", "told"), [('"abc-3"', "abc-3"), ("abc-3", "abc-3"), ('W/"abc"', "abc"), ("", ""), ('""', "")]
)
def test_an_etag_has_no_quotes(etag: str, told: str) -> None:
    """However the store wrote it."""
    assert bare(etag) == told


@pytest.mark.parametrize(
    ("answer", "version"),
    [({}, None), ({"VersionId": None}, None), ({"VersionId": "null"}, None), ({"VersionId": "v1"}, "v1")],
)
def test_a_version_is_one_only_where_versions_are_kept(answer: dict[str, Any], version: str | None) -> None:
    """A bucket that was versioned once says "null"."""
    assert version_of(answer) == version
