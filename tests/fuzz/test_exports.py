"""Damaged and hostile exports: loaded, or refused by ``ExportError``. The program is a small one without a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import flaxdet
from flaxdet.inference.exported import ExportError
from tests.fuzz import cases

RAW, BUCKET = 64, (64, 96)
PROGRAM, WEIGHTS = "detect-64x96.stablehlo", "weights.safetensors"
TENSORS = {"params.a.kernel": np.ones((2, 3), np.float32), "params.b": np.zeros(2, np.float32)}


def program(weights, images, size, new_size):
    """Gives one detection in each image."""
    del new_size
    boxes = jnp.zeros((images.shape[0], 1, 4)) + weights["params.b"][0]
    found = jnp.ones((images.shape[0], 1))
    return {"boxes": boxes, "scores": found, "labels": found.astype(jnp.int32), "valid": size[:, :1] > 0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The folder of a whole export, its signature, and the content of its other files."""
    folder = tmp_path_factory.mktemp("artifact")
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in TENSORS.items()},
        jax.ShapeDtypeStruct((batch, RAW, RAW, 3), jnp.uint8),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    )
    files = {PROGRAM: bytes(exported.serialize()), WEIGHTS: safetensors.numpy.save(TENSORS, {"format": "1"})}
    signature = {
        "format": 1,
        "model": "FCOS",
        "date": "2026-01-31",
        "jax": jax.__version__,
        "calling_convention_version": jax.export.maximum_supported_calling_convention_version,
        "platforms": ["cpu", "cuda", "tpu"],
        "raw_size": RAW,
        "inputs": ["weights"],
        "outputs": ["boxes [B, K, 4]"],
        "resize": {"min_size": 64, "max_size": 96, "fixed_size": None, "size_divisible": 32},
        "compiler_options": {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}},
        "categories": ["__background__", "cat"],
        "weights": {"file": WEIGHTS, "sha256": digest(files[WEIGHTS])},
        "programs": [{"file": PROGRAM, "bucket": list(BUCKET), "batch": None, "sha256": digest(files[PROGRAM])}],
    }
    write(folder, json.dumps(signature), files)
    return folder, signature, files


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(folder, signature: str, files: dict[str, bytes]) -> None:
    for name, content in {"signature.json": signature.encode("utf-8", "surrogatepass"), **files}.items():
        (folder / name).write_bytes(content)


def test_the_artifact_is_whole(artifact):
    """So that the cases below fail for what was done to it."""
    detector = flaxdet.load_exported(artifact[0])
    (found,) = detector([np.zeros((64, 64, 3), np.uint8)])
    assert found["scores"].tolist() == [1]


def test_exports(artifact, tmp_path):
    _, signature, files = artifact
    image = np.zeros((64, 64, 3), np.uint8)

    def case(rng):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        (tmp_path / "a").mkdir()
        kind, made, contents = rng.random(), signature, files
        if kind < 0.7:
            made = cases.mutated(rng, signature)
        elif kind < 0.9:  # damage that the hash tells, or that it was made for
            name = [PROGRAM, WEIGHTS][rng.integers(2)]
            contents = {**files, name: cases.damaged(rng, files[name])}
            if rng.random() < 0.7:
                made = json.loads(json.dumps(signature))
                part = made["weights"] if name == WEIGHTS else made["programs"][0]
                part["sha256"] = digest(contents[name])
        write(tmp_path / "a", cases.to_json(rng, made), contents)
        if kind >= 0.9:
            name = [PROGRAM, WEIGHTS, "signature.json"][rng.integers(3)]
            (tmp_path / "a" / name).unlink()
            special = rng.integers(5)
            if special == 0:
                os.mkfifo(tmp_path / "a" / name)
            elif special == 1:
                (tmp_path / "a" / name).symlink_to(["/dev/zero", "/etc/passwd", "nowhere", name][rng.integers(4)])
            elif special == 2:
                (tmp_path / "a" / name).mkdir()
            elif special == 3:
                (tmp_path / "a" / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*days later")
            detector = flaxdet.load_exported(tmp_path / "a")
        assert detector.signature["raw_size"] == RAW
        assert all("/" not in part["file"] for part in detector.signature["programs"])
        if rng.random() < 0.02 and contents[PROGRAM] == files[PROGRAM]:  # the program is compiled here
            detector([image])

    cases.run(150, case, ExportError)
