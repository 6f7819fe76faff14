"""Damage in the files of Orbax, and processes that are killed while they save."""

import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import orbax_saver
import pytest
from checkpoints import FormatError, about_of, alone, gaussian, manager_of, restore, save
from io_files import assert_same

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# What restores from damaged files runs alone: one that fails halfway leaves coroutines and
# event loops of Orbax's behind, which Python reports whenever it finds them.


def flip_bits(folder):
    """Flips bits of a checkpoint, one at a time, and restores from what it then is."""
    folder = pathlib.Path(folder)
    tree = {"kernel": bj.pack(gaussian((256, 32))), "bias": gaussian((512,))}
    with manager_of(folder) as manager:
        save(manager, 0, tree=tree)
        manager.wait_until_finished()
    about = bj.io.describe(tree)
    target = bj.io.abstract(about)
    draw, seen = random.Random(0), collections.Counter()
    data = [path for path in files_of(folder / "0" / "tree") if "/d/" in str(path)]
    for _ in range(150):
        path = draw.choices(data, [path.stat().st_size for path in data])[0]
        kept = path.read_bytes()
        bad = bytearray(kept)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            with manager_of(folder) as manager:  # a manager keeps what it has read
                got = restore(manager, 0, tree=target)["tree"]
        except Exception:  # Orbax has no one kind for damage
            seen["refused by Orbax"] += 1
            continue
        finally:
            path.write_bytes(kept)
        try:
            bj.io.check(got, about)
        except FormatError:
            seen["refused by check"] += 1
            continue
        assert_same(got, tree)
        seen["harmless"] += 1
    assert seen["refused by check"] > 50, seen  # Orbax restored these without a word


@pytest.mark.full
def test_flipped_bits_in_the_files_of_orbax_are_refused_or_do_no_harm(folder):
    alone(__file__, f"flip_bits({str(folder)!r})")


class Saver:
    """The process of orbax_saver.py, and what the children that it forks have said."""

    def __init__(self, folder):
        script = pathlib.Path(__file__).parents[1] / "orbax_saver.py"
        self.process = subprocess.Popen(
            [sys.executable, script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def lines(self):
        for line in self.process.stdout:
            word, number = line.split()
            yield word.decode(), int(number)

    def killed(self, draw):
        """Forks a child and kills it, up to three saves after its first began; what it said."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        said = []
        for word, number in self.lines():
            said.append((word, number))
            if word == "child":
                child = number
            elif word == "begins":
                time.sleep(draw.uniform(0, 0.6))
                os.kill(child, signal.SIGKILL)
                break
        for word, number in self.lines():
            if word == "dead":
                return said
            said.append((word, number))
        raise AssertionError("the saver ended")

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def restored(folder):
    """The steps that a manager lists: those that came back to the bit, and those refused."""
    good, refused = [], []
    with orbax_saver.manager_of(folder) as manager:
        for step in manager.all_steps():
            try:
                about = about_of(manager, step)
                got = restore(manager, step, tree=bj.io.abstract(about))["tree"]
                bj.io.check(got, about)
            except Exception:  # whatever Orbax makes of a step that is half deleted
                refused.append(step)
                continue
            assert about == bj.io.describe(orbax_saver.tree_of(step))
            good.append(step)
    return good, refused


def kill(folder):
    """Kills savers until a hundred were inside a save, and restores after each."""
    folder = pathlib.Path(folder)
    draw, saver = random.Random(0), Saver(folder)
    seen, last = collections.Counter(), -1
    try:
        while seen["inside a save"] < 100:
            said = saver.killed(draw)
            last = max([last, *(step for word, step in said if word == "saved")])
            good, refused = restored(folder)
            # All that was said to be there is there; what is refused was older, and being deleted.
            assert last < 0 or max(good) >= last, (good, refused, said)
            assert max(refused, default=-1) < max(good, default=0), (good, refused, said)
            seen.update({"kills": 1, "inside a save": said[-1][0] == "begins"})
            seen.update({"restored": len(good), "half deleted": len(refused)})
    finally:
        saver.close()
    print(dict(seen), "steps saved:", last + 1)
    assert last > 20  # they save, between and before the kills


@pytest.mark.slow
def test_kill_at_a_hundred_random_moments_loses_nothing(folder):
    alone(__file__, f"kill({str(folder)!r})")
