"""What the fuzzers share: how many cases, how a case is run and judged, hostile values and mutations.

Some cases of each kind run with the suite; ``FLAXDET_FUZZ=10000 pytest tests/fuzz`` runs 10,000 of each. A case is made
of its seed alone: the message of a failure names the seed, and ``FLAXDET_FUZZ_SEED=123`` runs this case only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

SECONDS = 2.0  # of the CPU, a case
PATIENCE = 20  # seconds of the clock, after which a case hangs
GROWTH = 300 << 20  # bytes of memory, all cases of a test together
_WATCHED = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "ctypes.dlopen",
)

_state: dict[str, Any] = {"on": False, "events": []}


def _audit(event: str, arguments: Any) -> None:
    if _state["on"] and event in _WATCHED:
        _state["events"].append((event, str(arguments)[:200]))


sys.addaudithook(_audit)  # can't be removed; does nothing outside of a case


def seeds(short: int) -> range:
    """The seeds of the cases: ``short`` many, or as the environment says."""
    if "FLAXDET_FUZZ_SEED" in os.environ:
        return range(seed := int(os.environ["FLAXDET_FUZZ_SEED"]), seed + 1)
    return range(int(os.environ.get("FLAXDET_FUZZ", short)))


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _hangs(*_: Any) -> None:
    raise KeyboardInterrupt(f"hangs for {PATIENCE} seconds")


def run(
    short: int, case: Callable[[np.random.Generator], Any], refusals: type[Exception] | tuple[type[Exception], ...]
):
    """Runs the cases.

    Args:
        short: number of cases in the suite.
        case: runs one case; gets a generator of the case's own.
        refusals: the documented errors. Their messages must be one line that can be printed.

    Prints how many were read and refused; fails with a list of all faults.
    """
    faults, counts, slowest = [], Counter(), (0.0, -1)
    with contextlib.suppress(refusals):
        case(np.random.default_rng(2**40))  # imports
    before = _memory()
    previous = signal.signal(signal.SIGALRM, _hangs)
    try:
        for seed in seeds(short):
            _state.update(on=True, events=[])
            start = time.process_time()
            signal.alarm(PATIENCE)
            try:
                case(np.random.default_rng(seed))
                counts["read"] += 1
            except refusals as error:
                counts[type(error).__name__] += 1
                text = str(error)
                if not text.isprintable() and "\n  " not in text:  # StateDictError lists its faults in lines
                    faults.append((seed, f"the message is not one line: {text[:300]!r}"))
            except BaseException as error:  # KeyboardInterrupt of _hangs, and panics of Rust
                faults.append((seed, f"{type(error).__name__}: {str(error)[:300]}"))
            finally:
                signal.alarm(0)
                _state["on"] = False
            took = time.process_time() - start
            slowest = max(slowest, (took, seed))
            if took > SECONDS:
                faults.append((seed, f"takes {took:.1f} s"))
            if _state["events"]:
                faults.append((seed, f"runs code: {_state['events']}"))
            if (grown := _memory() - before) > GROWTH:
                faults.append((seed, f"takes {grown >> 20} MB"))
                before = _memory()
    finally:
        signal.signal(signal.SIGALRM, previous)
    print(f"\n{dict(counts)}, slowest {slowest[0]:.2f} s (seed {slowest[1]}), {(_memory() - before) >> 20} MB")
    assert not faults, f"{len(faults)} faults; as (seed, fault): " + "; ".join(map(str, faults[:20]))
    # of many mutations some leave the file whole, and most don't
    assert len(seeds(short)) < 100 or (counts["read"] and counts.total() > counts["read"])


# --- hostile values

TEXTS = [
    "",
    ".",
    "..",
    "../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "C:\\Windows\\system32",
    "\\\\server\\share",
    "NUL",
    "con.txt",
    "COM1",
    "a/b",
    "a\\b",
    "a\x00b",
    "\x1b[2J",
    "a\nb",
    "\ud800",
    "\u202eabc",
    "x" * 5000,
    "file:///etc/passwd",
    "http://example.com/x",
    "${HOME}",
    "%s%s%n",
    "cpu",
    "__class__",
    "nan",
    "1e999",
]


def value(rng: np.random.Generator, depth: int = 2) -> Any:
    """Any value of JSON, mostly a bad one."""
    kind = rng.integers(12)
    if kind == 0:
        return TEXTS[rng.integers(len(TEXTS))]
    if kind == 1:
        return [None, True, False][rng.integers(3)]
    if kind == 2:
        return int(rng.integers(-5, 100))
    if kind == 3:
        return [2**31, -(2**31), 2**63, 2**64, 10**30, -(10**30), 10**400, 2**53 + 1][rng.integers(8)]
    if kind == 4:
        return [0.0, -0.0, 0.5, -1.5, 1e308, -1e308, 1e-320, 3.5e38][rng.integers(8)]
    if kind == 5:
        return [float("nan"), float("inf"), -float("inf")][rng.integers(3)]
    if kind == 6:
        made: Any = 1
        for _ in range(int(rng.choice([3, 50, 2000, 100_000]))):
            made = [made]
        return made
    if kind == 7:
        return [0] * int(rng.choice([0, 1, 2, 3, 1001, 200_000]))
    if depth and kind < 10:
        return [value(rng, depth - 1) for _ in range(rng.integers(4))]
    if depth:
        names = [*TEXTS[:20], "type", "file", "sha256", "sizes", "key"]
        return {names[rng.integers(len(names))]: value(rng, depth - 1) for _ in range(rng.integers(4))}
    return TEXTS[rng.integers(len(TEXTS))]


def mutated(rng: np.random.Generator, whole: Any) -> Any:
    """A copy of a JSON value with a part replaced, left out, doubled or renamed."""
    if isinstance(whole, dict) and whole and rng.random() < 0.9:
        keys = list(whole)
        key = keys[rng.integers(len(keys))]
        made = dict(whole)
        kind = rng.random()
        if kind < 0.1:
            del made[key]
        elif kind < 0.15:
            made[TEXTS[rng.integers(len(TEXTS))]] = made.pop(key)
        elif kind < 0.2:
            made[key] = made[keys[rng.integers(len(keys))]]
        elif kind < 0.25:
            made[TEXTS[rng.integers(len(TEXTS))]] = value(rng)
        else:
            made[key] = mutated(rng, made[key])
        return made
    if isinstance(whole, list) and whole and rng.random() < 0.8:
        made = list(whole)
        at = int(rng.integers(len(made)))
        kind = rng.random()
        if kind < 0.15:
            del made[at]
        elif kind < 0.3:
            made.insert(at, made[at])
        else:
            made[at] = mutated(rng, made[at])
        return made
    if isinstance(whole, (int, float)) and not isinstance(whole, bool) and rng.random() < 0.3:
        return whole * [0, -1, 2, 10**6, 10**20][rng.integers(5)]
    if isinstance(whole, str) and rng.random() < 0.3:
        return damaged(rng, whole.encode()).decode("latin-1")
    return value(rng)


def to_json(rng: np.random.Generator, whole: Any) -> str:
    """JSON, now and then damaged as text, or with a key twice."""
    with contextlib.suppress(RecursionError):
        text = json.dumps(whole)
        if rng.random() < 0.05 and text.startswith("{"):
            return '{"format": 1, ' + text[1:]
        if rng.random() < 0.1:
            return damaged(rng, text.encode()).decode("latin-1")
        return text
    return "[" * 100_000


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Bytes with some bytes changed, left out, doubled, or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not data:
            break
        at = int(rng.integers(len(data)))
        kind = rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            data[at : at + 4] = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)][rng.integers(3)]
        elif kind == 5:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)
