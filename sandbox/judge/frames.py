"""Length-prefixed JSON frames over a stream socket, with a size cap both ways and optional descriptors.

A frame is four bytes of length (network order) and that many bytes of ASCII JSON.
The functions of `json` and `struct` are bound here once, so that a program which overwrites `json.dumps` in its own
process breaks only what it does itself.
"""

import json
import os
import socket
import struct
from typing import Any, Protocol, cast

MAX_FRAME = 32 << 20

_HEADER = struct.Struct("!I")
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_decode = json.JSONDecoder().decode


class Stream(Protocol):
    """What frames travel on: a stream socket, or something that reads and writes like one."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...


class FrameError(Exception):
    """The peer sent something that is not a frame, or a frame is too large."""


def send(sock: Stream, message: Any, fds: tuple[int, ...] = ()) -> None:
    """Sends one frame; `fds` travel with its first byte, over a UNIX socket.

    Raises FrameError when it is too large, OSError when the peer left.
    """
    body = _encode(message).encode("ascii")
    if len(body) > MAX_FRAME:
        raise FrameError(f"frame of {len(body)} bytes, at most {MAX_FRAME} are allowed")
    data = _HEADER.pack(len(body)) + body
    sent = socket.send_fds(cast(socket.socket, sock), [data], fds) if fds else 0
    if sent < len(data):  # an empty send would fail when the peer has its frame and is gone
        sock.sendall(data[sent:])


def recv(sock: Stream, max_bytes: int = MAX_FRAME) -> Any:
    """One frame. Raises EOFError when the peer closed the stream, FrameError when what it sent is no frame.

    Descriptors that a peer sends along are dropped by the kernel, as nothing asks for them.
    """
    return _body(sock, _exactly(sock, _HEADER.size), max_bytes)


def recv_with_fds(sock: socket.socket, max_fds: int) -> tuple[Any, list[int]]:
    """Like `recv`, with the descriptors that came along. Only for peers that are trusted."""
    header, fds, _, _ = socket.recv_fds(sock, _HEADER.size, max_fds)
    try:
        if not header:
            raise EOFError
        header += _exactly(sock, _HEADER.size - len(header))
        return _body(sock, header, MAX_FRAME), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _body(sock: Stream, header: bytes, max_bytes: int) -> Any:
    (size,) = _HEADER.unpack(header)
    if size > max_bytes:
        raise FrameError(f"frame of {size} bytes, at most {max_bytes} are allowed")
    body = _exactly(sock, size)
    try:
        return _decode(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from None


def _exactly(sock: Stream, size: int) -> bytes:
    """`size` bytes; memory grows with what really arrived, not with what a header claims."""
    chunk = sock.recv(min(size, 1 << 16)) if size else b""
    if len(chunk) == size:
        return chunk
    data = bytearray(chunk)
    while chunk and len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 20))
        data += chunk
    if len(data) < size:
        raise EOFError
    return bytes(data)
