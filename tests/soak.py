"""Twenty minutes of training, packing, saving, loading and serving, with faults injected.

    python tests/soak.py                  20 minutes
    python tests/soak.py --minutes 1

Each round trains a network a little further, saves it packed (plain and dense in turn) and its
optimizer's state beside it, loads both, serves from what was loaded, and injects one of each
fault: a batch with NaN, a save that is killed, a damaged file, a disk that fills. Every fault
must be seen, what was there before must still be there to the bit, and memory must stay flat.
The exit code is 1 if not. ``.ci/slow`` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

import bitnet_jax as bj

FEATURES, BATCH, STEPS = (64, 256, 256, 10), 64, 50
WARM_UP = 5  # rounds until caches and allocators are full
GROWTH = 32 << 20  # bytes that the process may gain from there

SAVER = """
import sys, numpy as np, bitnet_jax as bj
path, = sys.argv[1:]
tree = {str(i): np.random.default_rng(i).integers(0, 2**63, 1 << 16) for i in range(16)}
print("ready", flush=True)
while True:
    bj.io.save(path, tree)
"""


class Net(nn.Module):
    """A ternary network with ReLU."""

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate(FEATURES[1:]):
            x = bj.linen.BitDense(features, name=f"layer_{i}")(x)
            x = nn.relu(x) if i < 2 else x
        return x


NET, TX = Net(), optax.adamw(1e-3)
forward = jax.jit(lambda params, x: NET.apply({"params": params}, x))


@jax.jit
def step(params, state, x, labels):
    """One step, or none where the loss is not finite; and the loss."""

    def loss_of(params):
        logits = NET.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, new = TX.update(grads, state, params)
    new = optax.apply_updates(params, updates), new
    good = jnp.isfinite(loss)
    return *jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (params, state)), loss


class Soak:
    """The state of a run, and what became of the faults."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.random = np.random.default_rng(seed)
        self.path = folder / "model.bitnet.safetensors"
        self.trained = folder / "trained.bitnet.safetensors"
        self.other = folder / "other.bitnet.safetensors"
        self.params = NET.init(jax.random.key(seed), jnp.ones((1, FEATURES[0])))["params"]
        self.state = TX.init(self.params)
        self.teacher = self.random.standard_normal((FEATURES[0], FEATURES[-1]))
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self.losses: list[float] = []

    def check(self, what: str, good: bool) -> None:
        """Counts what went as it must, and keeps what did not."""
        if good:
            self.seen[what] += 1
        else:
            self.failures.append(what)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and their labels."""
        x = self.random.standard_normal((BATCH, FEATURES[0])).astype(np.float32)
        return x, np.argmax(x @ self.teacher, axis=-1)

    def train(self) -> None:
        """Some steps; one of them with a NaN, which must reach the loss and change nothing."""
        bad, good = self.random.integers(STEPS), np.nan
        for i in range(STEPS):
            x, labels = self.batch()
            if i == bad:
                x[self.random.integers(BATCH), self.random.integers(FEATURES[0])] = np.nan
            before = self.params
            self.params, self.state, loss = step(before, self.state, x, labels)
            if i == bad:
                self.check("a NaN batch reached the loss", bool(np.isnan(loss)))
                self.check("a NaN batch changed nothing", same(before, self.params))
            else:
                good = float(loss)
        self.losses.append(good)

    def save_load_serve(self, round_: int) -> None:
        """Files give back the bits, and the bits give the outputs of training."""
        packed, _ = bj.pack_params(self.params)
        bj.io.save(self.path, packed, dense=bool(round_ % 2))
        loaded = bj.io.load(self.path, mmap=bool(round_ % 3))
        self.check("a packed tree came back", same(packed, loaded))
        count, moments = self.state[0].count, self.state[0]
        trained = {"params": self.params, "mu": moments.mu, "nu": moments.nu, "count": count}
        bj.io.save(self.trained, trained)
        self.check("a trained tree came back", same(trained, bj.io.load(self.trained)))
        x, _ = self.batch()
        want = np.asarray(forward(self.params, x))
        for served in (loaded, bj.prepare(loaded)):
            bits = np.asarray(forward(served, x)).tobytes() == want.tobytes()
            self.check("served outputs have the bits of training", bits)

    def damage(self) -> None:
        """A flipped bit, a file cut short or with more at its end: refused by name."""
        content = bytearray(self.path.read_bytes())
        kind = self.random.integers(3)
        if kind == 0:
            at = int(self.random.integers(8 * len(content)))
            content[at // 8] ^= 1 << at % 8
        elif kind == 1:
            del content[int(self.random.integers(len(content))) :]
        else:
            content += bytes(int(self.random.integers(1, 100)))
        damaged = self.path.with_name("damaged.bitnet.safetensors")
        damaged.write_bytes(content)
        try:
            bj.io.load(damaged)
        except bj.io.FormatError as error:
            self.check("a damaged file was refused", str(damaged) in str(error))
        else:
            self.check("a damaged file was refused", False)

    def fill_the_disk(self) -> None:
        """A save that the disk has no room for: an OSError, and the old file."""
        before = self.path.read_bytes()
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * 0.7), limits[1]))
        try:
            bj.io.save(self.path, bj.pack_params(self.params)[0])
        except OSError:
            self.seen["a full disk was reported"] += 1
        else:
            self.failures.append("a full disk was not reported")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)
        self.check("a full disk left the old file", self.path.read_bytes() == before)

    def kill_a_save(self) -> None:
        """Kills a process that is saving: the file is whole, the old one or the new one."""
        command = [sys.executable, "-c", SAVER, str(self.other)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None
            saver.stdout.readline()
            time.sleep(self.random.uniform(0, 0.3))
            saver.kill()
        with contextlib.suppress(FileNotFoundError):  # killed before its first save was over
            loaded = bj.io.load(self.other)
            whole = all(
                (loaded[str(i)] == np.random.default_rng(i).integers(0, 2**63, 1 << 16)).all()
                for i in range(16)
            )
            self.check("a killed save left a whole file", bool(whole))

    def no_litter(self) -> None:
        """What a killed save wrote aside is the only thing left over; it is taken away."""
        for path in self.path.parent.glob(".bitnet_jax-*.tmp"):
            path.unlink()
        names = {p.name.split(".")[0] for p in self.path.parent.iterdir()}
        self.check("nothing else was left", names <= {"model", "trained", "other", "damaged"})


def same(a, b) -> bool:
    """Whether two trees have the same structure and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> int:
    """Runs rounds until the time is over, and prints what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, started, round_ = time.monotonic() + 60 * arguments.minutes, 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(unit="round") as progress:
        soak = Soak(pathlib.Path(folder), arguments.seed)
        while time.monotonic() < end or round_ <= WARM_UP:
            soak.train()
            soak.save_load_serve(round_)
            soak.damage()
            soak.fill_the_disk()
            soak.kill_a_save()
            soak.no_litter()
            round_ += 1
            progress.update()
            if round_ == WARM_UP:
                started = resident()
    ended = resident()
    for what, count in sorted(soak.seen.items()):
        print(f"{count:>8,}  {what}")
    print(f"{round_:>8,}  rounds; losses {soak.losses[0]:.3f} to {soak.losses[-1]:.3f}")
    sizes = (f"{size / 2**20:.1f} MiB" for size in (started, ended))
    print(f"resident: {next(sizes)} after {WARM_UP} rounds, {next(sizes)} at the end")
    if ended - started > GROWTH:
        soak.failures.append(f"memory grew by {(ended - started) / 2**20:.1f} MiB")
    for what, count in Counter(soak.failures).items():
        print(f"FAILED {count} times: {what}")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
