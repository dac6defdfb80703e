"""The clients of boto3 and aioboto3, set up as we need them; the only module that imports those.

Every request is sent once: botocore's own retries are off, for it cannot know what is safe to repeat.
"""

from __future__ import annotations

from typing import Any

from ckpt_sidecar import __version__

CONTROL_CONNECTIONS = 32
CONNECT_TIMEOUT = 10  # seconds; also for each piece of a body
READ_TIMEOUT = 60  # seconds without a byte of the answer; S3 sends blanks while it completes an upload


def say_owner(client: Any, owner: str) -> None:
    """Have every request of the client say which account must own the bucket."""

    def say(params: dict[str, Any], **_rest: Any) -> None:
        params["ExpectedBucketOwner"] = owner

    client.meta.events.register("before-parameter-build.s3", say)


def made(endpoint_url: str | None, workers: int) -> tuple[Any, Any]:
    """Make boto3's client, and aioboto3's as a context manager. Imports and credentials may take seconds."""
    import aioboto3  # noqa: PLC0415 (0.8 s, which `--help` need not wait for)
    import boto3  # noqa: PLC0415
    from aiobotocore.config import AioConfig  # noqa: PLC0415
    from aiobotocore.session import AioSession  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415

    common: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "tcp_keepalive": True,
        "request_checksum_calculation": "when_required",  # we declare our own
        "response_checksum_validation": "when_required",
        "user_agent_extra": f"ckpt-sidecar/{__version__}",
    }
    bodies = Config(
        max_pool_connections=workers,
        s3={"payload_signing_enabled": False},  # no SHA-256 over the body, over plain http neither
        **common,
    )
    control = AioConfig(
        max_pool_connections=CONTROL_CONNECTIONS, http_session_cls=_verifying_session(), **common
    )
    session, aio_session = Session(), AioSession()
    aio_session.register_component("data_loader", session.get_component("data_loader"))  # 12 MiB, once
    client = boto3.Session(botocore_session=session).client("s3", endpoint_url=endpoint_url, config=bodies)
    aio = aioboto3.Session(botocore_session=aio_session)
    return client, aio.client("s3", endpoint_url=endpoint_url, config=control)


def _verifying_session() -> Any:
    """As aiobotocore's, which never looks for the host's name in a certificate, and by a proxy at none."""
    from aiobotocore.httpsession import AIOHTTPSession  # noqa: PLC0415

    class VerifyingSession(AIOHTTPSession):  # type: ignore[misc]
        def _get_ssl_context(self) -> Any:
            context = super()._get_ssl_context()
            context.check_hostname = True
            return context

        def _setup_proxy_ssl_context(self, proxy_url: str) -> Any:
            return super()._setup_proxy_ssl_context(proxy_url) or self._get_ssl_context()

    return VerifyingSession
