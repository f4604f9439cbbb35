"""Opens addresses: https, or http to this machine, and nothing else; a transfer that makes no progress is ended.

A timeout of a socket begins anew with each byte, so a server that sends one byte a minute would be waited for for
hours, in the header too. Here a transfer has to bring so many bytes in each span of time, in however many pieces.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

SPAN = 60.0  # seconds, in which a transfer has to bring LEAST bytes
LEAST = 60_000  # bytes; the slowest modems brought as much


def check_address(url: str) -> None:
    """Raises ValueError unless the address is one of https, or of http on this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname))):
        return
    raise ValueError(f"the address {url[:200]!r} should begin with https://")


def open_address(url: str) -> http.client.HTTPResponse:
    """Requests an address, and follows redirections to addresses that ``check_address`` takes.

    Args:
        url: the address.

    Returns:
        The response, to be read and closed; reading raises TimeoutError if less than LEAST bytes arrive within SPAN
        seconds.

    Raises:
        ValueError: for another kind of address, here or in a redirection.
        OSError, http.client.HTTPException: if the server can't be reached, fails, or sends its header too slowly.
    """
    check_address(url)
    opener = urllib.request.OpenerDirector()
    # no file:, ftp: or data:, as urlopen would take
    local = urllib.parse.urlsplit(url).scheme == "http"
    for handler in (
        urllib.request.ProxyHandler({}) if local else urllib.request.ProxyHandler(),
        _Handler(),
        _SecureHandler(),
        _Redirections(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "flaxdet", "Accept-Encoding": "identity"})
    return opener.open(request, timeout=SPAN)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Redirections(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            check_address(newurl)
        except ValueError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Watched(io.RawIOBase):
    """The bytes of a socket; TimeoutError when too few arrive."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open
        self._until, self._received = time.monotonic() + SPAN, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            left = self._until - time.monotonic()
            if left <= 0:
                if self._received < LEAST:
                    raise TimeoutError(f"timed out: {self._received:,} bytes arrived within {SPAN:g} seconds")
                self._until, self._received, left = time.monotonic() + SPAN, 0, SPAN
            self._sock.settimeout(left)
            with contextlib.suppress(TimeoutError):  # the span is over; not by the file, which reads no more after that
                count = self._sock.recv_into(buffer)
                self._received += count
                return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Watched(sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_Connection, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_SecureConnection, req)
