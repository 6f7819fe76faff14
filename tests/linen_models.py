"""Linen models that several tests make ternary: under every lifted transform, odd classes."""

import abc
import functools

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(24)(x))), None


JitBlock = nn.jit(Block)


class Model(nn.Module):
    kind: str = "plain"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.kind.startswith("scan"):
            layers["variable_axes"]["params"] = 0 if self.kind == "scan" else 1
            x, _ = nn.scan(nn.remat(Block), length=3, **layers)(name="blocks")(x, None)
        elif self.kind == "vmap":
            x, _ = nn.vmap(Block, **layers)(name="blocks")(jnp.stack([x, 2 * x]))
            x = x.mean(0)
        elif self.kind == "ensemble":
            x, _ = nn.vmap(Block, in_axes=None, axis_size=3, **layers)(name="blocks")(x)
            x = x.mean(0)
        elif self.kind == "shared":
            block = Block(name="block")
            x, _ = block(block(x)[0])
        else:
            made = {"plain": Block, "remat": nn.remat(Block), "jit": JitBlock}[self.kind]
            for i in range(2):
                x, _ = made(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(x)

    def encode(self, x):
        return self(x)


def register(cls):
    """As diffusers' models: a decorator that wraps ``__init__`` and notes its arguments."""
    init = cls.__init__

    @functools.wraps(init)
    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        object.__setattr__(self, "config", dict(kwargs))

    cls.__init__ = noting
    return cls


@register
class WrappedInit(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.config.get("width", 8))(x)


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def width(self): ...

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width())(x)


class Concrete(Abstract):
    def width(self):
        return 8


class Doubled(nn.Module):
    width: int = 4

    def __post_init__(self):
        self.width = self.width * 2
        super().__post_init__()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)
