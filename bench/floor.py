"""The least that moving bytes costs: a socket, a buffer.

    floor.py WHAT URL FILE

sendall    a buffer, sent again and again until as many bytes have gone as the file has
readsend   the file, read into a buffer and sent from there
sendfile   the file, by the kernel
recv       into a buffer, again and again, and nowhere else
recvfile   into a buffer, and from there into a file
recvfile4  as recvfile, a quarter by each of four threads: what an interpreter makes of four connections
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

PIECE = 1 << 20


def connected(url: str) -> socket.socket:
    """Return a connection, by TLS where the URL says so."""
    where = urlsplit(url)
    plain = socket.create_connection((where.hostname or "", where.port or 0))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if where.scheme == "http":
        return plain
    context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"])
    return context.wrap_socket(plain, server_hostname=where.hostname)


def put(url: str, path: str, how: str) -> None:
    """Send."""
    size = os.stat(path).st_size
    with connected(url) as to, open(path, "rb", buffering=0) as file:
        to.sendall(f"PUT /bench/floor HTTP/1.1\r\nHost: bench\r\nContent-Length: {size}\r\n\r\n".encode())
        if how == "sendfile":
            done = 0
            while done < size:
                done += os.sendfile(to.fileno(), file.fileno(), done, size - done)
        else:
            buffer, left = memoryview(bytearray(PIECE)), size
            file.readinto(buffer)
            while left > 0:
                to.sendall(buffer[: min(PIECE, left)])
                left -= PIECE
                if how == "readsend":
                    file.readinto(buffer)
        assert to.recv(PIECE).startswith(b"HTTP/1.1 200")


def get(url: str, path: str, *, to_file: bool, connections: int) -> None:
    """Receive the object `floor`, which has the size of what was put there."""
    size = size_of(url)
    share = -(-size // connections)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(connections) as threads:
        target = file.fileno() if to_file else None
        spans = [range(start, min(start + share, size)) for start in range(0, size, share)]
        list(threads.map(lambda span: receive(url, span, target), spans))


def size_of(url: str) -> int:
    """Ask for it."""
    with connected(url) as source:
        source.sendall(b"HEAD /bench/floor HTTP/1.1\r\nHost: bench\r\n\r\n")
        head = source.recv(PIECE).lower()
    return int(head.partition(b"content-length:")[2].split()[0])


def receive(url: str, span: range, target: int | None) -> None:
    """Receive these bytes, and write them where they belong."""
    buffer = memoryview(bytearray(PIECE))
    with connected(url) as source:
        head = (
            f"GET /bench/floor HTTP/1.1\r\nHost: bench\r\nRange: bytes={span.start}-{span.stop - 1}\r\n\r\n"
        )
        source.sendall(head.encode())
        piece = memoryview(bytes(buffer[: source.recv_into(buffer)]).partition(b"\r\n\r\n")[2])
        at = span.start
        while True:
            if target is not None:
                os.pwrite(target, piece, at)
            at += len(piece)
            if at >= span.stop:
                break
            piece = buffer[: source.recv_into(buffer, min(PIECE, span.stop - at))]
            if not piece:
                raise ConnectionError("cut")


if __name__ == "__main__":
    what, url, path = sys.argv[1:]
    if "send" in what:
        put(url, path, what)
    else:
        get(url, path, to_file=what != "recv", connections=4 if what == "recvfile4" else 1)
