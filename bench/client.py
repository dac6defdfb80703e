"""One transfer by one of the libraries, as its documentation does it: client.py LIBRARY put|get FILE KEY."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

BUCKET = "bench"
URL = os.environ["AWS_ENDPOINT_URL"]
COPY_BYTES = 8 << 20


def with_awscrt(way: str, path: str, key: str) -> None:
    """The CRT's S3 client, which `aws configure set s3.preferred_transfer_client crt` and others use."""
    from awscrt import auth, http, io, s3

    where = urlsplit(URL)
    group = io.EventLoopGroup()
    bootstrap = io.ClientBootstrap(group, io.DefaultHostResolver(group))
    options = io.TlsContextOptions()
    options.verify_peer = where.scheme == "https"
    if where.scheme == "https":
        options.override_default_trust_store_from_path(None, os.environ["AWS_CA_BUNDLE"])
    tls = io.ClientTlsContext(options)
    client = s3.S3Client(
        bootstrap=bootstrap,
        region="us-east-1",
        tls_mode=s3.S3RequestTlsMode.ENABLED if where.scheme == "https" else s3.S3RequestTlsMode.DISABLED,
        tls_connection_options=tls.new_connection_options() if where.scheme == "https" else None,
        credential_provider=auth.AwsCredentialsProvider.new_environment(),
        throughput_target_gbps=10,
    )
    headers = http.HttpHeaders([("host", where.netloc)])
    if way == "put":
        headers.add("content-length", str(Path(path).stat().st_size))
        checksum = s3.S3ChecksumConfig(
            algorithm=s3.S3ChecksumAlgorithm.CRC64NVME, location=s3.S3ChecksumLocation.TRAILER
        )
        request = client.make_request(
            type=s3.S3RequestType.PUT_OBJECT,
            request=http.HttpRequest("PUT", f"/{BUCKET}/{key}", headers),
            send_filepath=path,
            checksum_config=checksum,
        )
    else:
        request = client.make_request(
            type=s3.S3RequestType.GET_OBJECT,
            request=http.HttpRequest("GET", f"/{BUCKET}/{key}", headers),
            recv_filepath=path,
        )
    request.finished_future.result()


def with_s3torchconnector(way: str, path: str, key: str) -> None:
    """Its checkpoint's reader and writer, as torch.save and torch.load use them."""
    from s3torchconnector import S3Checkpoint, S3ClientConfig

    config = S3ClientConfig(force_path_style=True)
    store = S3Checkpoint(region="us-east-1", endpoint=URL, s3client_config=config)
    if way == "put":
        with open(path, "rb") as source, store.writer(f"s3://{BUCKET}/{key}") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
    else:
        with store.reader(f"s3://{BUCKET}/{key}") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)


def with_obstore(way: str, path: str, key: str) -> None:
    """Rust's object_store."""
    import obstore

    options = {"allow_http": True}
    store = obstore.store.S3Store(
        BUCKET, endpoint=URL, region="us-east-1", virtual_hosted_style_request=False, client_options=options
    )
    if way == "put":
        obstore.put(store, key, Path(path), use_multipart=True)
    else:
        with open(path, "wb") as target:
            target.writelines(obstore.get(store, key).stream(COPY_BYTES))


def with_s3fs(way: str, path: str, key: str) -> None:
    """fsspec, by which PyTorch Lightning and others write to s3://."""
    import s3fs

    system = s3fs.S3FileSystem(endpoint_url=URL)
    if way == "put":
        system.put_file(path, f"{BUCKET}/{key}")
    else:
        system.get_file(f"{BUCKET}/{key}", path)


def with_boto3(way: str, path: str, key: str) -> None:
    """What most scripts call."""
    import boto3

    client = boto3.client("s3")
    if way == "put":
        client.upload_file(path, BUCKET, key)
    else:
        client.download_file(BUCKET, key, path)


if __name__ == "__main__":
    library, way, path, key = sys.argv[1:]
    globals()[f"with_{library}"](way, path, key)
