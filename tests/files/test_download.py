"""The download of weights, against a local HTTP server that misbehaves."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors

from flaxdet.files import download, https
from flaxdet.zoo import weights

PAYLOAD = bytes(range(256)) * 9000  # 2.3 MB: several chunks
NAME = f"tiny-{hashlib.sha256(PAYLOAD).hexdigest()[:8]}.pth"
STATE_DICT = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
STATE_FILE = to_safetensors(STATE_DICT)
STATE_NAME = f"state-{hashlib.sha256(STATE_FILE).hexdigest()[:8]}.pth"
FILES = {NAME: PAYLOAD, STATE_NAME: STATE_FILE}


TRICKLES = ("trickle", "trickled header", "stops", "stopped header")
TARGETS = {"moved": "/good/{name}", "away": "http://192.0.2.1/x", "file": "file:///etc/passwd"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves FILES; the first part of the path says how it goes wrong."""

    def do_GET(self):
        self.server.requests.append(self.path)
        _, behaviour, name = self.path.split("/")
        behaviour = behaviour.replace("%20", " ")
        if behaviour in TRICKLES:
            return self.trickle(behaviour)
        if behaviour in TARGETS:
            self.send_response(302)
            self.send_header("Location", TARGETS[behaviour].format(name=name))
            self.end_headers()
            return
        if behaviour == "missing":
            self.send_error(404)
            return
        body = FILES[name]
        sent = {"truncated": body[: len(body) // 2], "silent": body[: len(body) // 2]}.get(behaviour, body)
        if behaviour == "damaged":
            sent = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(200)
        if behaviour not in ("silent", "endless"):  # without a length only the hash can tell
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(sent), 1 << 18):
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(sent[start : start + (1 << 18)])
            if behaviour in ("slow", "steady"):
                time.sleep(0.02 if behaviour == "slow" else 0.1)

        if behaviour == "endless":
            self.wfile.write(sent)

    def trickle(self, behaviour):
        """A header and a beginning, and then a byte now and then, or nothing."""
        content = b"HTTP/1.1 200 OK\r\n" + (b"" if "header" in behaviour else b"\r\nabc")
        with contextlib.suppress(OSError):
            self.wfile.write(content)
            for _ in range(20):
                if "trickle" in behaviour:
                    self.wfile.write(b"x")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(server):
    server.requests.clear()
    return lambda behaviour, name=NAME: (
        f"http://127.0.0.1:{server.server_address[1]}/{behaviour.replace(' ', '%20')}/{name}"
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Empty caches, ours and torch hub's, and no proxy."""
    monkeypatch.setenv("FLAXDET_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "ours"


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# What arrives


def test_downloads_once(url, cache, server):
    path = download.fetch(url("good"), progress=False)
    assert path == cache / NAME
    assert path.read_bytes() == PAYLOAD
    assert download.fetch(url("good"), progress=False) == path
    assert len(server.requests) == 1
    assert contents(cache) == [NAME]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("missing", "HTTP status 404"),
        ("damaged", "SHA-256"),
        ("truncated", "of 2304000 bytes"),
        ("silent", "SHA-256"),
    ],
)
def test_what_arrives_wrong_is_refused(url, cache, behaviour, reason):
    with pytest.raises(weights.DownloadError, match=reason) as caught:
        download.fetch(url(behaviour), progress=False)
    message = str(caught.value)
    assert url(behaviour) in message
    assert str(cache / NAME) in message
    assert "\n" not in message
    assert contents(cache) == []
    assert download.fetch(url("good"), progress=False).read_bytes() == PAYLOAD  # no trace of the failure


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com/x.pth",
        "http://127.0.0.1@example.com/x.pth",
        "http://localhost.example.com/x.pth",
        "ftp://127.0.0.1/x.pth",
        "file:///etc/passwd",
        "data:text/plain,x",
        "//example.com/x.pth",
        "x.pth",
    ],
)
def test_https_alone(cache, address):
    with pytest.raises(weights.DownloadError, match=r"the address .* should begin with https://"):
        download.fetch(address)
    assert contents(cache) == []


@pytest.mark.parametrize("name", ["", "..", "a%2fb/..", "nul", "x" * 300, "a\\b"])
def test_names_that_are_no_files(url, cache, name):
    with pytest.raises(weights.DownloadError, match="the last part of the address should be"):
        download.fetch(url("good", name))
    assert contents(cache) == []


def test_redirections(url, cache, server):
    assert download.fetch(url("moved"), progress=False).read_bytes() == PAYLOAD
    assert server.requests[-1] == f"/good/{NAME}"
    (cache / NAME).unlink()
    with pytest.raises(weights.DownloadError, match=r"'http://192\.0\.2\.1/x' should begin with https://"):
        download.fetch(url("away"), progress=False)
    with pytest.raises(weights.DownloadError, match="HTTP status 302"):
        download.fetch(url("file"), progress=False)
    assert contents(cache) == []


@pytest.mark.parametrize("behaviour", ["good", "silent", "endless"])
def test_the_published_size_is_a_limit(url, cache, behaviour):
    """Stated by the server, or found out while the file arrives."""
    with pytest.raises(
        weights.DownloadError, match=r"the server (offers 2,304,000|sends more than the file's 1,000) bytes"
    ):
        download.fetch(url(behaviour), progress=False, most=1000)
    assert contents(cache) == []
    if behaviour == "good":
        assert download.fetch(url(behaviour), progress=False, most=len(PAYLOAD)).exists()


def test_the_size_in_the_table_is_the_limit(monkeypatch):
    """torchvision's own figure, in MiB: resnet50-0676ba61.pth has 102,530,333 bytes."""
    given = {}
    monkeypatch.setattr(weights, "fetch", lambda url, **options: given.update(options, url=url))
    weights.ResNet50_Weights.IMAGENET1K_V1.get_path(progress=False)
    assert given["url"].endswith("/resnet50-0676ba61.pth")
    assert 102_530_333 <= given["most"] < 102_540_000


@pytest.mark.parametrize("behaviour", ["trickle", "trickled header", "stops", "stopped header"])
def test_no_progress(url, cache, monkeypatch, behaviour):
    """One byte now and then would restart a timeout of the socket each time."""
    monkeypatch.setattr(https, "SPAN", 0.4)
    start = time.monotonic()
    with pytest.raises(weights.DownloadError, match=r"timed out: \d+ bytes arrived within 0\.4 seconds"):
        download.fetch(url(behaviour), progress=False)
    assert time.monotonic() - start < 5
    assert contents(cache) == []


def test_slow_but_steady(url, monkeypatch):
    """More than a span of time is no fault where enough arrives."""
    monkeypatch.setattr(https, "SPAN", 0.5)
    assert download.fetch(url("steady"), progress=False).read_bytes() == PAYLOAD  # takes 0.9 seconds


def test_offline_says_what_to_do(cache):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/{NAME}"
        with pytest.raises(OSError, match="refused") as caught:
            download.fetch(address)
    for part in (address, str(cache / NAME), "flaxdet.load", "--weights FILE"):
        assert part in str(caught.value)


def test_interruption_leaves_nothing(url, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(url("good"), progress=False)
    assert contents(cache) == []


@pytest.mark.parametrize("progress", [True, False])
def test_progress(url, capfd, progress):
    download.fetch(url("good"), progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert (NAME in err and "100%" in err) if progress else err == ""


def test_state_dict_of_a_member(url):
    class TinyWeights(weights.WeightsEnum):
        V1 = weights.Weights(url=url("good", STATE_NAME), preset=weights.ObjectDetection(), meta={})

    state_dict = TinyWeights.V1.get_state_dict(progress=False)
    assert list(state_dict) == list(STATE_DICT)
    np.testing.assert_array_equal(state_dict["a.weight"], STATE_DICT["a.weight"])
    assert TinyWeights.V1.get_path(progress=False).name == STATE_NAME


# Caches


def test_where_the_caches_are(monkeypatch, tmp_path):
    assert weights.cache_dir() == tmp_path / "ours"
    monkeypatch.delenv("FLAXDET_CACHE")
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_dir() == tmp_path / "xdg" / "flaxdet"
    assert download._hub_cache() == tmp_path / "xdg" / "torch" / "hub" / "checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / ".cache" / "flaxdet"
    monkeypatch.setenv("FLAXDET_CACHE", "~/elsewhere")
    assert weights.cache_dir() == tmp_path / "elsewhere"


def test_torch_hub_is_looked_in_first(url, cache, server, tmp_path):
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / NAME).write_bytes(PAYLOAD)
    assert download.fetch(url("good")) == hub / NAME
    assert not server.requests
    (hub / NAME).write_bytes(PAYLOAD + b"!")
    with pytest.warns(UserWarning, match=r"hub.*is damaged"):
        assert download.fetch(url("good"), progress=False) == cache / NAME
    assert (hub / NAME).read_bytes() == PAYLOAD + b"!"  # not ours to mend


def test_damaged_cache_is_replaced(url, cache):
    cache.mkdir()
    (cache / NAME).write_bytes(PAYLOAD[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        path = download.fetch(url("good"), progress=False)
    assert path.read_bytes() == PAYLOAD


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "too large"])
def test_special_files_in_the_cache(url, cache, kind):
    """They are neither waited for nor read; a download takes their place, and what a link leads to stays."""
    cache.mkdir()
    pipe = cache.parent / "pipe"
    os.mkfifo(pipe)
    if kind == "pipe":
        os.mkfifo(cache / NAME)
    elif kind == "too large":
        (cache / NAME).write_bytes(PAYLOAD + b"!")
    else:
        (cache / NAME).symlink_to("/dev/zero" if kind == "device" else pipe)
    with pytest.warns(UserWarning, match="expected at most" if kind == "too large" else "Not a regular file"):
        path = download.fetch(url("good"), progress=False, most=len(PAYLOAD))
    assert path.is_file()
    assert not path.is_symlink()
    assert path.read_bytes() == PAYLOAD
    assert pipe.is_fifo()


def test_unwritable_cache_is_named(url, cache):
    cache.write_text("a file where the folder should be")
    with (
        pytest.warns(UserWarning, match="can't be read"),
        pytest.raises(weights.DownloadError, match=str(cache)),
    ):
        download.fetch(url("good"), progress=False)


# Several at once


def test_killed_download_is_cleared_away_later(url, cache):
    cache.mkdir()
    fresh, stale = (cache / f"{NAME}.{token}.partial" for token in ("00", "11"))
    fresh.write_bytes(b"another process is at it")
    stale.write_bytes(b"killed")
    os.utime(stale, (time.time() - 2 * 24 * 3600,) * 2)
    download.fetch(url("good"), progress=False)
    assert contents(cache) == [NAME, fresh.name]


def test_threads_at_once(url, cache):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download.fetch(url("slow"), progress=False), range(4)))
    assert {path.read_bytes() == PAYLOAD for path in paths} == {True}
    assert contents(cache) == [NAME]


@pytest.mark.ci  # two processes; the test above has threads at once
def test_processes_at_once(url, cache):
    code = "import sys; from flaxdet.files import download; download.fetch(sys.argv[1], progress=False)"
    command = [sys.executable, "-c", code, url("slow")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert (cache / NAME).read_bytes() == PAYLOAD
    assert contents(cache) == [NAME]
