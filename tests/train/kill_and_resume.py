"""Kills a training run with SIGKILL at random moments, lets it go on, and compares the bits of what comes out.

    python tests/train/kill_and_resume.py [--trials 10] [--kills 2] [--steps 40] [--seed 0]

A tiny FCOS is trained on synthetic images, saving every other step, so that many of the kills fall into a save, and
evaluated every eighth, so that some fall into an evaluation. Each trial begins a run anew, kills it ``--kills`` times,
resumes it after each, and compares everything in the last checkpoint (parameters, statistics, optimiser, key, place in
the data), the best checkpoint's step and the log with those of a run that nothing happened to.
Exit status 0: every trial ended in the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY, EVALUATE_EVERY = 2, 8


def train(data: Path, run: Path, total: int) -> None:
    """The run of ``total`` steps: begins, or goes on from what ``run`` holds, and prints a digest of the end."""
    import jax
    import numpy as np
    import optax

    from flaxdet.data import read_coco, train_batches
    from flaxdet.train import Checkpoints, create_state, fit, make_train_step
    from flaxdet.train.logs import JsonLinesWriter, read_log
    from tests.tiny import FCOS_NAME, tiny_model, tiny_variables

    model = tiny_model(FCOS_NAME)
    dataset = read_coco(data / "images", data / "annotations.json")
    batches = train_batches(dataset, model.transform, batch_size=2, steps=total, seed=3)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.005, momentum=0.9))
    state = create_state(model, tiny_variables(model), tx, key=jax.random.key(1), ema=True)
    checkpoints = Checkpoints(run / "checkpoints", config={"steps": total})
    if checkpoints.last is not None:
        state, place, _ = checkpoints.restore(state)
        batches.set_state(place)
    step = make_train_step(model, tx, ema_decay=0.99)
    print("begin", int(state.step), flush=True)

    def evaluate(variables: Any, at: int) -> dict[str, float]:
        time.sleep(0.1)  # so that kills fall into it
        return {"AP": float(np.abs(variables["params"]["backbone"]["conv0"]["bias"]).sum()) % 0.01, "AP/red": math.nan}

    log = JsonLinesWriter(run / "log.jsonl", resume_from=int(state.step))
    options = {"evaluate": evaluate, "evaluate_every": EVALUATE_EVERY, "save_every": SAVE_EVERY, "writers": [log]}
    state = fit(step, state, batches, steps=total, checkpoints=checkpoints, log_every=3, progress=False, **options)
    best = checkpoints.best
    checkpoints.close()
    log.close()

    checkpoints = Checkpoints(run / "checkpoints", config={"steps": total})
    state, place, _ = checkpoints.restore(state)
    rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_log(run / "log.jsonl")]
    assert [row["step"] for row in rows if "AP" in row] == list(range(EVALUATE_EVERY, total + 1, EVALUATE_EVERY))
    digest = hashlib.sha256(repr((sorted(place.items()), best, rows)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    print("end", int(state.step), digest.hexdigest(), flush=True)


def start(data: Path, run: Path, steps: int) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(data / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--worker", str(data), str(run), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen, steps: int) -> str:
    """Waits for the end of a run; the digest of its last checkpoint."""
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit(f"the run failed with status {process.returncode}:\n{output}")
    _, step, digest = output.strip().splitlines()[-1].split()
    assert int(step) == steps
    return digest


def trials(count: int, kills: int, steps: int, seed: int) -> int:
    """Runs the comparison; the number of trials that ended in other bits."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import write_coco

    rng = random.Random(seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_coco(data, count=7, seed=1)
        finish(start(data, data / "first", steps), steps)  # fills the cache of compiled programs
        process = start(data, data / "undisturbed", steps)
        assert process.stdout is not None
        process.stdout.readline()
        begun = time.perf_counter()
        expected = finish(process, steps)
        duration = time.perf_counter() - begun
        for trial in range(count):
            run, moments = data / f"trial{trial}", []
            for _ in range(kills):
                process = start(data, run, steps)
                assert process.stdout is not None
                begin = process.stdout.readline().split()
                time.sleep(rng.uniform(0, 0.8 * duration))
                process.send_signal(signal.SIGKILL)
                process.communicate()
                last = max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)
                moments.append(f"{begin[-1]}-{last}")
            same = finish(start(data, run, steps), steps) == expected
            wrong += not same
            print(
                f"trial {trial}: killed in steps {', '.join(moments)}: {'same' if same else 'OTHER'} bits", flush=True
            )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--kills", type=int, default=2, help="of each run")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(*options.worker, options.steps)
    else:
        sys.exit(1 if trials(options.trials, options.kills, options.steps, options.seed) else 0)
