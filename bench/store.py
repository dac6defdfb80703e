"""A real store, which somebody else runs: the same clients, the same file, what a bucket costs in earnest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab import BUCKET, Server, erase, s3

REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class Store(Server):
    """It is no process of ours, and takes nothing that is not signed; credentials come by the environment."""

    def environment(self) -> dict[str, str]:
        """What any client finds it by, beside what is in the environment already."""
        region = os.environ.get("AWS_REGION", REGION)
        return {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": region, "AWS_DEFAULT_REGION": region}


@contextmanager
def borrowed(url: str) -> Iterator[Store]:
    """A bucket of our own in the store; what is in it goes with it at the end."""
    store = Store(url, 0)
    client = s3(store)
    if any(each["Name"] == BUCKET for each in client.list_buckets()["Buckets"]):
        raise SystemExit(f"{url} has a bucket {BUCKET} already: that of the bench is made and deleted by it")
    client.create_bucket(Bucket=BUCKET)
    try:
        yield store
    finally:
        erase(store, "")
        client.delete_bucket(Bucket=BUCKET)
