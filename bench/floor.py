"""The least that moving bytes costs: one socket, one buffer.

    floor.py WHAT URL FILE

sendall    a buffer, sent again and again until as many bytes have gone as the file has
readsend   the file, read into a buffer and sent from there
sendfile   the file, by the kernel
recv       into a buffer, again and again, and nowhere else
recvfile   into a buffer, and from there into a file
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
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


def get(url: str, path: str, *, to_file: bool) -> None:
    """Receive the object `floor`, which has the size of what was put there."""
    buffer = memoryview(bytearray(PIECE))
    with connected(url) as source, open(path, "wb", buffering=0) as file:
        source.sendall(b"GET /bench/floor HTTP/1.1\r\nHost: bench\r\n\r\n")
        got = source.recv_into(buffer)
        head, _, rest = bytes(buffer[:got]).partition(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        left = int(length.split(b":")[1]) - len(rest)
        file.write(rest)
        while left > 0:
            got = source.recv_into(buffer, min(PIECE, left))
            if got == 0:
                raise ConnectionError("cut")
            if to_file:
                file.write(buffer[:got])
            left -= got


if __name__ == "__main__":
    what, url, path = sys.argv[1:]
    if "send" in what:
        put(url, path, what)
    else:
        get(url, path, to_file=what == "recvfile")
