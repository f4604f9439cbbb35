"""Cases of the fuzzers: a few in the suite, FLAXDET_FUZZ of each kind where it is set; each case is named by its seed.

A fault is anything but success or the documented error. ``FLAXDET_FUZZ_FIRST`` is the first seed, to repeat a case.
"""

from __future__ import annotations

import os
import random

FEW = 25


def seeds() -> range:
    """The seeds of each kind."""
    first = int(os.environ.get("FLAXDET_FUZZ_FIRST", "0"))
    return range(first, first + int(os.environ.get("FLAXDET_FUZZ", FEW)))


def mutate(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes: bytes, spans, numbers, the end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(rng.randbytes(rng.randrange(64)))
        # the header is where most of the logic is
        place = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
        length = rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(8):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(length)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                other = rng.randrange(len(data))
                data[place:place] = data[other : other + length]
            case 5:
                data[place : place + length] = bytes([rng.choice((0, 255))]) * length
            case 6:
                number = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                data[place : place + 4] = number.to_bytes(4, rng.choice(("big", "little")))
            case _:
                data += rng.randbytes(length)
    return bytes(data)
