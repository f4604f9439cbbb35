"""Texts of error messages, which may quote a file that anybody wrote."""

from __future__ import annotations

_LONGEST = 2000  # characters


def one_line(text: str) -> str:
    """The text without line breaks and control characters, since parts of it may come from an untrusted file."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 2 * _LONGEST].split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
