"""Servers that misbehave, addresses that lead elsewhere, a cache with anything in it: a download is whole, or there is
a ``DownloadError`` and nothing is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
import time
import warnings

import pytest

from flaxdet.files import download, https
from tests.fuzz import cases

PAYLOAD = bytes(range(256)) * 400
NAME = f"tiny-{hashlib.sha256(PAYLOAD).hexdigest()[:8]}.pth"
PARTIAL = f"{NAME}.0.partial"
SPAN = 0.3  # seconds, in place of 60


class Server:
    """Answers each connection with the next of ``answers``: pieces of bytes, and pauses in seconds."""

    def __init__(self) -> None:
        self.answers: list[list[bytes | float]] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                connection.recv(65536)
                for piece in self.answers.pop(0) if self.answers else []:
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        time.sleep(piece)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXDET_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(https, "SPAN", SPAN)
    server = Server()
    yield server
    server.close()


def answer(rng, server: Server) -> list[bytes | float]:
    """Header and body, whole or in some way wrong."""
    kind, body = rng.integers(16), PAYLOAD
    status, headers = b"200 OK", {b"Content-Length": b"%d" % len(PAYLOAD)}
    here = f"http://127.0.0.1:{server.port}/{NAME}".encode()
    if kind == 0:
        body = cases.damaged(rng, PAYLOAD)
    elif kind == 1:
        body = PAYLOAD[: rng.integers(len(PAYLOAD))]
    elif kind == 2:
        body = PAYLOAD * 5
        headers = {} if rng.random() < 0.5 else {b"Content-Length": b"%d" % len(body)}
    elif kind == 3:
        lengths = [b"-1", b"0", b"99999999999999999999", b"abc", b"1, 2", b"\xc2\xb2", b"1" * 5000, b""]
        headers = {b"Content-Length": lengths[rng.integers(len(lengths))]}
    elif kind == 4:
        headers = {b"Transfer-Encoding": b"chunked"}
        sizes = [b"%x" % len(body), b"zz", b"-5", b"f" * 40, b"%x;a=b" % len(body)]
        body = sizes[rng.integers(len(sizes))] + b"\r\n" + body + b"\r\n0\r\n\r\n"
    elif kind == 5:
        targets = [
            here,
            b"/x",
            b"",
            b"file:///etc/passwd",
            b"ftp://127.0.0.1/x",
            b"http://192.0.2.1/x",
            b"https:///",
            b"//",
        ]
        targets += [
            b"http://localhost.example.com/x",
            b"http://[::1",
            b"data:,abc",
            b"http://127.0.0.1@192.0.2.1/",
            b"\xff\xfe",
        ]
        status = [b"301 Moved", b"302 Found", b"307 Temporary", b"308 Permanent"][rng.integers(4)]
        headers[b"Location"] = targets[rng.integers(len(targets))]
        server.answers += [[b"HTTP/1.1 200 OK\r\n\r\n" + PAYLOAD]] * int(rng.integers(2))
    elif kind == 6:
        status = [
            b"404 Not Found",
            b"500 Error",
            b"204 No Content",
            b"206 Partial",
            b"100 Continue",
            b"999 x",
            b"abc",
            b"-1 x",
        ][rng.integers(8)]
    elif kind == 7:
        headers |= {b"X-%d" % i: b"a" * 100 for i in range(int(rng.choice([50, 200])))}
    elif kind == 8:
        headers[b"X" * int(rng.choice([10, 70_000]))] = b"\x00\r\n folded"
    elif kind == 9:
        headers[b"Content-Encoding"] = b"gzip"
    head = b"HTTP/1.1 " + status + b"\r\n" + b"".join(b"%b: %b\r\n" % item for item in headers.items()) + b"\r\n"
    if kind == 10:
        head = cases.damaged(rng, head)
    if kind == 11:
        head = rng.bytes(int(rng.integers(1, 200)))
    if kind == 12:
        return []
    if kind == 13 and rng.random() < 0.1:  # stops, or trickles, in the header or in the body
        whole = head + body
        at = int(rng.integers(1, len(whole) if rng.random() < 0.5 else len(head)))
        return [whole[:at], *([0.05, whole[at : at + 1]] * 12), 0.1]
    return [head, body]


def furnish(rng, cache) -> None:
    """Something in the cache, in place of the file or of the folder."""
    shutil.rmtree(cache, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(cache)
    kind, target = rng.integers(14), cache / NAME
    if kind == 0:
        cache.write_bytes(b"a file")
        return
    if kind > 6:
        return
    cache.mkdir()
    if kind == 1:
        os.mkfifo(target)
    elif kind == 2:
        target.symlink_to(["/dev/zero", "/dev/null", "nowhere", NAME][rng.integers(4)])
    elif kind == 3:
        target.mkdir()
    elif kind == 4:
        target.write_bytes(cases.damaged(rng, PAYLOAD))
    elif kind == 5:
        os.mkfifo(cache / PARTIAL)
    elif kind == 6:
        target.write_bytes(PAYLOAD)


def test_downloads(server, tmp_path):
    cache = tmp_path / "ours"

    def case(rng):
        furnish(rng, cache)
        server.answers = []
        server.answers = [answer(rng, server), *server.answers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                path = download.fetch(
                    f"http://127.0.0.1:{server.port}/a/{NAME}", progress=False, most=len(PAYLOAD) + 10
                )
            except download.DownloadError:
                left = [path.name for path in cache.glob("*.partial")] if cache.is_dir() else []
                assert set(left) <= {PARTIAL}  # which ``furnish`` left
                assert not (cache / NAME).is_file() or (cache / NAME).read_bytes() != PAYLOAD
                raise
        assert path.read_bytes() == PAYLOAD
        assert path == cache / NAME

    cases.run(200, case, download.DownloadError)


def test_addresses(server, tmp_path):
    """No other scheme, host or name of a file than can be meant."""
    parts = [
        "http",
        "https",
        "file",
        "ftp",
        "data",
        "HTTP",
        "",
        "gopher",
        ":",
        "//",
        "/",
        "127.0.0.1",
        "[::1]",
        "@",
        "%2e%2e",
        "..",
    ]
    parts += [
        ".",
        "?",
        "#",
        "\n",
        "\x00",
        "localhost",
        f":{server.port}",
        "x.pth",
        "NUL",
        "a\\b",
        "[",
        "]",
        "é",
        "\ud800",
        " ",
    ]

    def case(rng):
        server.answers = [[b"HTTP/1.1 200 OK\r\n\r\nabc"]]
        start = [
            "http://127.0.0.1",
            f"http://127.0.0.1:{server.port}",
            "http://[::1]:1",
            "",
            "file:///",
            "http://192.0.2.1/",
        ]
        url = start[rng.integers(len(start))] + "".join(parts[rng.integers(len(parts))] for _ in range(rng.integers(6)))
        if url.lower().startswith("https:") or ("192.0.2.1" not in url and "127.0.0.1" not in url):
            url = url.replace("https", "ftp")  # nothing is sent to other machines
        if rng.random() < 0.2:
            url = f"http://127.0.0.1:{server.port}/{'/..' * rng.integers(3)}/x{rng.integers(3)}.pth?{url}"
        path = download.fetch(url, progress=False)
        assert path.parent in (tmp_path / "ours", tmp_path / "torch" / "hub" / "checkpoints")
        assert path.read_bytes() == b"abc"

    cases.run(200, case, download.DownloadError)
