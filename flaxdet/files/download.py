"""Downloads of files, with checks and a cache."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import os
import re
import secrets
import time
import urllib.error
import urllib.parse
import warnings
from pathlib import Path

from flaxdet.files import https, schema
from flaxdet.files.messages import one_line
from flaxdet.files.opening import open_regular

_CHUNK = 1 << 20
_MOST = 4 << 30  # bytes of a file whose size is not known
_STALE = 24 * 3600  # seconds after which an unfinished file belongs to no running download


class DownloadError(OSError):
    """A download failed; the message names the URL and the target, and says how to work offline."""


def cache_dir() -> Path:
    """The folder of downloaded files: $FLAXDET_CACHE, else flaxdet in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("FLAXDET_CACHE"):
        return Path(folder).expanduser()
    return _user_cache() / "flaxdet"


def fetch(url: str, *, progress: bool = True, most: int = _MOST) -> Path:
    """Returns the local copy of a file, downloading it on first use.

    Looks first into torch hub's cache (``$TORCH_HOME/hub/checkpoints``), then into flaxdet's. In a name that
    ends in ``-0123abcd.ext`` the hexadecimal digits are the beginning of the file's SHA-256, and a copy with
    another SHA-256 is not used. Each download writes a temporary file and renames it at the end, so that
    processes don't disturb each other and the cache holds only complete files.

    Args:
        url: address of the file: https, or http to this machine; redirections lead nowhere else.
        progress: show a progress bar on stderr while downloading.
        most: the published size in bytes; a larger file is refused.

    Raises:
        DownloadError: if the file can't be downloaded, is larger than ``most``, stops or trickles (less than 60 KB in
            60 seconds), arrives damaged, or can't be written.
    """
    target = cache_dir()
    try:
        name = _name(url)
        target = cache_dir() / name
        digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
        prefix = digits[1] if digits else ""
        for path in (_hub_cache() / name, target):
            if _is_whole(path, prefix, most):
                return path
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, target, prefix, progress, most)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error)
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP status {error.code}"
            error.close()
        raise DownloadError(
            one_line(
                f"could not download {url} to {target}: {reason or type(error).__name__}. "
                "Without a net, put the file there, or name one of your own: flaxdet.load('FILE.pth'), "
                "flaxdet verify --weights FILE"
            )
        ) from error
    return target


def _name(url: str) -> str:
    """The name of the file in the cache: the last part of the address."""
    https.check_address(url)
    name = urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1]
    schema.file_name(name, "the last part of the address")
    return name


def _download(url: str, target: Path, prefix: str, progress: bool, most: int) -> None:
    """Downloads to a unique file beside the target, checks length and hash, and renames the file to the target."""
    from tqdm import tqdm

    _remove_stale(target)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with https.open_address(url) as response, open(partial, "xb") as file:
            if response.status != 200:
                raise ValueError(f"HTTP status {response.status}")
            length = response.headers.get("Content-Length")
            size = int(length) if length is not None and length.isdecimal() else None
            if size is not None and size > most:
                raise ValueError(f"the server offers {size:,} bytes, and the file has at most {most:,}")
            digest, received = hashlib.sha256(), 0
            options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "desc": target.name}
            with tqdm(total=size, disable=not progress, **options) as bar:
                while chunk := response.read1(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
                    if received > most:
                        raise ValueError(f"the server sends more than the file's {most:,} bytes")
            if size is not None and received != size:
                raise ValueError(f"the transfer ended after {received} of {size} bytes")
            if not digest.hexdigest().startswith(prefix):
                raise ValueError(f"its SHA-256 begins with {digest.hexdigest()[: len(prefix)]}, not with {prefix}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _remove_stale(target: Path) -> None:
    """Removes unfinished files of downloads that were killed."""
    for path in target.parent.glob(f"{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE:
                path.unlink()


def _is_whole(path: Path, prefix: str, most: int) -> bool:
    """Whether the file exists and its SHA-256 begins with ``prefix``; warns if the file can't be used."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                warnings.warn(f"{path} has {size:,} bytes, expected at most {most:,}, ignored", stacklevel=3)
                return False
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return False
    except OSError as error:
        warnings.warn(f"{path} can't be read ({error.strerror or error}), ignored", stacklevel=3)
        return False
    if not digest.startswith(prefix):
        beginning = digest[: len(prefix)]
        warnings.warn(f"{path} is damaged (SHA-256 {beginning}..., not {prefix}...), ignored", stacklevel=3)
        return False
    return True


def _hub_cache() -> Path:
    """Where torch.hub keeps checkpoints."""
    home = os.environ.get("TORCH_HOME")
    return (Path(home).expanduser() if home else _user_cache() / "torch") / "hub" / "checkpoints"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
