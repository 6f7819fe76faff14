"""Processes that save by Orbax without end, to be killed; run by test_checkpoint.py.

Importing JAX and Orbax takes seconds, a killed process must do it again, and a process
whose JAX has started threads cannot be forked. So one process imports, starts nothing,
and forks for every line that it reads; what is forked starts its own JAX.
"""

import itertools
import os
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

import bitnet_jax as bj

BYTES = 16 << 20


def tree_of(step):
    """16 MiB that no compression makes smaller, another for every step."""
    raw = np.random.default_rng(step).bytes(BYTES)
    words = np.frombuffer(raw, np.uint32).reshape(4, -1, 256)
    return {"layers": {i: words[i] for i in range(4)}, "step": np.full(1, step, np.int32)}


def manager_of(folder):
    """A manager that keeps two steps and saves in the background."""
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))


def items(tree):
    """What a checkpoint holds: the tree and its description."""
    about = ocp.args.JsonSave(bj.io.describe(tree))
    return ocp.args.Composite(tree=ocp.args.StandardSave(tree), about=about)


def say(*words):
    """One line, in one write: what was said before a SIGKILL has arrived."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def save_for_ever(folder):
    """Saves one step after the other, and says when each is begun and when it is there."""
    manager = manager_of(folder)
    latest = manager.latest_step()
    for step in itertools.count(0 if latest is None else latest + 1):
        tree = jax.device_put(tree_of(step))
        say("begins", step)
        manager.save(step, args=items(tree))
        manager.wait_until_finished()
        say("saved", step)


def main(folder):
    """Forks a saver for every line of the standard input, and says its id and its end."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            save_for_ever(pathlib.Path(folder))
        say("child", child)
        os.waitpid(child, 0)
        say("dead", child)


if __name__ == "__main__":
    main(sys.argv[1])
