"""What the tests of checkpoints share: trees, managers, processes of their own."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import io_files
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import bitnet_jax as bj

FormatError = bj.io.FormatError
KERNELS = io_files.KERNELS | {"head": ((10, 6), bj.Int8Config(), {})}


def gaussian(shape, seed=0, dtype=np.float32):
    return jnp.asarray(io_files.gaussian(shape, seed, dtype))


def packed_tree():
    """Every kind of leaf that a served model has."""
    kernels = {k: {"kernel": bj.pack(gaussian(s), c, **a)} for k, (s, c, a) in KERNELS.items()}
    kernels["half"] = {"kernel": bj.pack(gaussian((8, 4), dtype=jnp.bfloat16))}
    norms = {"scale": jnp.float32([jnp.nan, -0.0, 1e-45]), "step": jnp.int32(7)}
    return {**kernels, "norm": norms, "layers": {10: jnp.ones(2, jnp.bfloat16), 2: jnp.ones(1)}}


def small():
    return {
        "dense": {"kernel": bj.pack(gaussian((23, 10))), "bias": gaussian((10,))},
        "head": {"kernel": bj.pack(gaussian((10, 6)), bj.Int8Config())},
    }


def manager_of(folder, **options):
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def save(manager, step, **trees):
    """Saves trees and their descriptions, as the README does."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    about = {name: bj.io.describe(tree) for name, tree in trees.items()}
    manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)))


def about_of(manager, step):
    return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]


def restore(manager, step, **targets):
    """What Orbax makes of targets, unchecked."""
    items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    return manager.restore(step, args=ocp.args.Composite(**items))


def round_trip(folder, tree, like=None, sharding=None):
    with manager_of(folder) as manager:
        save(manager, 3, tree=tree)
        manager.wait_until_finished()
    with manager_of(folder) as manager:
        about = about_of(manager, 3)["tree"]
        assert about == bj.io.describe(tree)
        target = bj.io.abstract(about, like=like, sharding=sharding)
        return bj.io.check(restore(manager, 3, tree=target)["tree"], about)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
    "grokfast_ema": lambda: optax.chain(bj.optim.grokfast_ema(), optax.adamw(1e-3)),
    "grokfast_ma": lambda: optax.chain(bj.optim.grokfast_ma(window_size=5), optax.sgd(1e-3)),
    "mugrokfast": lambda: bj.optim.mugrokfast(learning_rate=1e-3, phase="curriculum"),
    "watch_trits": lambda: optax.chain(bj.optim.watch_trits(every=2), optax.sgd(1e-3, 0.9)),
}


def start(file, call, stdout=None, **environment):
    """Starts a process that calls a function of a test's file."""
    name = pathlib.Path(file).stem
    folders = [str(pathlib.Path(file).parent), str(pathlib.Path(__file__).parent)]
    paths = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", f"import {name}; {name}.{call}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **environment},
        stdout=stdout,
        text=True,
    )


def alone(file, call, **environment):
    """Runs a function of a test's file in a process of its own; an error in it fails."""
    assert start(file, call, **environment).wait() == 0


def replace(tree, name, leaf="kernel", **changed):
    """The tree with one packed kernel changed."""
    kernel = dataclasses.replace(tree[name][leaf], **changed)
    return {**tree, name: {**tree[name], leaf: kernel}}
