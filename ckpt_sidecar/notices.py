"""EC2's notices that the instance will be, or is likely to be, taken away (IMDSv2).

    PUT /latest/api/token                                     a token, for each question
    GET /latest/meta-data/spot/instance-action                404, or {"action": …, "time": …}: in two minutes
    GET /latest/meta-data/events/recommendations/rebalance    404, or {"noticeTime": …}: it is likely

Source: the Amazon EC2 user guide, "Spot Instance interruption notices" (which asks to poll every 5 seconds)
and "EC2 instance rebalance recommendations".
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ckpt_sidecar.events import Event, Failed, Interruption

if TYPE_CHECKING:
    from aiohttp import ClientSession

POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0  # it answers from the host itself, in milliseconds
TOKEN_SECONDS = 21_600  # the longest life that a token may have
MAX_ANSWER_BYTES = 65_536
IPV4, IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"
HINT = (
    "in a container the instance's metadata hop limit must be 2 or more; outside EC2 leave --ec2-notices out"
)


def endpoint_of(environment: Mapping[str, str]) -> str:
    """Return the service's URL, by the variables that the AWS tools have for it."""
    mode = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "")
    default = IPV6 if mode.lower() == "ipv6" else IPV4
    return (environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or default).rstrip("/")


async def watch_notices(
    endpoint: str,
    *,
    sleep: Callable[[float], Awaitable[None]],
    wall: Callable[[], float],
    noticed: Callable[[Interruption | None], Awaitable[None]],
    tell: Callable[[Event], None],
) -> None:
    """Ask every `POLL_SECONDS` until cancelled; hand over the first answer, and every one that is another.

    `wall` in seconds since the epoch. None says that there is no notice. A service that does not answer is
    told of once, and asked again.
    """
    from aiohttp import ClientError, ClientSession, ClientTimeout  # noqa: PLC0415  (half a second to import)

    last: Any = endpoint  # no answer yet
    silent = False
    async with ClientSession(timeout=ClientTimeout(total=ANSWER_SECONDS)) as session:
        service = _Service(session, endpoint)
        while True:
            try:
                found = await service.notice(wall)
            except (ClientError, OSError) as error:  # TimeoutError is one
                if not silent:
                    tell(Failed("notices", "unreachable", endpoint, str(error) or "it does not answer", HINT))
                silent = True
            else:
                silent = False
                note = found and found.note
                if note != last:
                    last = note
                    await noticed(found)
            await sleep(POLL_SECONDS)


class _Service:
    """The metadata service. What aiohttp raises comes out."""

    def __init__(self, session: ClientSession, endpoint: str) -> None:
        self._session = session
        self._endpoint = endpoint
        self._token = ""

    async def notice(self, wall: Callable[[], float]) -> Interruption | None:
        """Return the gravest notice that stands now."""
        action = await self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            return Interruption("spot", _field(action, "action"), _field(action, "time"), wall())
        likely = await self._get("/latest/meta-data/events/recommendations/rebalance")
        if likely is not None:
            return Interruption("rebalance", "", _field(likely, "noticeTime"), wall())
        return None

    async def _get(self, path: str) -> bytes | None:
        """Return what stands there, None where nothing does; a token that has run out is renewed once."""
        for _ in range(2):
            if not self._token:
                self._token = await self._new_token()
            headers = {"X-aws-ec2-metadata-token": self._token}
            async with self._session.get(self._endpoint + path, headers=headers) as answer:
                if answer.status == 404:
                    return None
                if answer.status == 401:
                    self._token = ""
                    continue
                answer.raise_for_status()
                return await answer.content.read(MAX_ANSWER_BYTES)
        raise PermissionError("it refuses its own token")

    async def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        async with self._session.put(f"{self._endpoint}/latest/api/token", headers=headers) as answer:
            answer.raise_for_status()
            return (await answer.content.read(MAX_ANSWER_BYTES)).decode("ascii", errors="replace").strip()


def _field(raw: bytes, name: str) -> str:
    """A text of the answer; "" where it is not there: that there is an answer is the notice."""
    with suppress(ValueError, AttributeError):
        value = json.loads(raw).get(name)
        return value if isinstance(value, str) else ""
    return ""
