"""Downloads of files, with checks and a cache."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_STALE = 24 * 3600  # seconds after which an unfinished file belongs to no running download


class DownloadError(OSError):
    """A download failed; the message names the URL and the target, and says how to work offline."""


def cache_dir() -> Path:
    """The folder of downloaded files: $FLAXDET_CACHE, else flaxdet in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("FLAXDET_CACHE"):
        return Path(folder).expanduser()
    return _user_cache() / "flaxdet"


def fetch(url: str, *, progress: bool = True) -> Path:
    """Returns the local copy of a file, downloading it on first use.

    Looks first into torch hub's cache (``$TORCH_HOME/hub/checkpoints``), then into flaxdet's. In a name that
    ends in ``-0123abcd.ext`` the hexadecimal digits are the beginning of the file's SHA-256, and a copy with
    another SHA-256 is not used. Each download writes a temporary file and renames it at the end, so that
    processes don't disturb each other and the cache holds only complete files.

    Args:
        url: address of the file.
        progress: show a progress bar on stderr while downloading.

    Raises:
        DownloadError: if the file can't be downloaded, arrives damaged, or can't be written.
    """
    name = url.rsplit("/", 1)[-1]
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    prefix = digits[1] if digits else ""
    target = cache_dir() / name
    for path in (_hub_cache() / name, target):
        if _is_whole(path, prefix):
            return path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, target, prefix, progress)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error)
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP status {error.code}"
            error.close()
        raise DownloadError(
            f"could not download {url} to {target}: {' '.join(reason.split()) or type(error).__name__}. "
            "Without a net, put the file there, or name one of your own: flaxdet.load('FILE.pth'), "
            "flaxdet verify --weights FILE"
        ) from error
    return target


def _download(url: str, target: Path, prefix: str, progress: bool) -> None:
    """Downloads to a unique file beside the target, checks length and hash, and renames the file to the target."""
    from tqdm import tqdm

    _remove_stale(target)
    headers = {"User-Agent": "flaxdet", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(partial, "xb") as file:
            length = response.headers.get("Content-Length")
            size = int(length) if length is not None and length.isdigit() else None
            digest, received = hashlib.sha256(), 0
            options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "desc": target.name}
            with tqdm(total=size, disable=not progress, **options) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
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
    for path in target.parent.glob(f"{target.name}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _is_whole(path: Path, prefix: str) -> bool:
    """Whether the file exists and its SHA-256 begins with ``prefix``; warns if the file is unreadable or damaged."""
    try:
        with open(path, "rb") as file:
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
