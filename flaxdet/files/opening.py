"""Opens files that may be anything: regular files alone, and files of other kinds are told by their first bytes."""

from __future__ import annotations

import errno
import io
import os
import stat

_KINDS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, which stands for the file: git lfs pull, or download the file itself",
    ),
    (b"\x1f\x8b", "is compressed by gzip: gunzip it first"),
    (b"BZh", "is compressed by bzip2: bunzip2 it first"),
    (b"\xfd7zXZ\x00", "is compressed by xz: unxz it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: extract it first"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script", b"<!--")
HEAD = 256  # bytes at the start that tell the kind


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file for reading, and never waits for a named pipe or reads from a device.

    Args:
        path: the file; a link is followed.

    Raises:
        OSError: if there is no such file, it may not be read, or it is no regular file.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)  # noqa: SIM115  (the caller closes it)
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "Not a regular file (a pipe, a socket or a device)", os.fspath(path))


def foreign_kind(head: bytes) -> str | None:
    """A phrase for a file that stands in place of the expected file, by the first ``HEAD`` bytes.

    Args:
        head: the beginning of the file.

    Returns:
        The phrase, such as "is a Git LFS pointer, ..."; None for any other file.
    """
    for magic, phrase in _KINDS:
        if head.startswith(magic):
            return phrase
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return "is a web page (HTML), which a server sent in place of the file: look at it in a browser"
    return None
