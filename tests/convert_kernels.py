"""Kernels, inputs and their statistics, for tests of the methods of conversion."""

import jax
import numpy as np

import bitnet_jax as bj
from bitnet_jax.convert._input_statistics import Statistics

NOTHING = Statistics(np.array([0]), None)


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def config(granularity, eps=1e-5, planes=1):
    return bj.TernaryConfig(granularity=granularity, eps=eps, planes=planes)


def inputs(k, tokens, seed=0):
    """Correlated inputs whose mean squares lie far apart."""
    rng = np.random.default_rng(seed)
    mix = np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k)
    return (rng.normal(size=(tokens, k)) @ mix) * np.exp(0.7 * rng.normal(size=k))


def kernel(k, n, seed=0):
    rng = np.random.default_rng(100 + seed)
    return (0.02 * rng.standard_t(5, size=(1, k, n))).astype(np.float32)


def seen(*of):
    """Statistics of slices that saw these inputs."""
    return Statistics(np.array([len(x) for x in of]), np.stack([x.T @ x for x in of]))


def diagonal(statistics):
    return Statistics(statistics.tokens, np.diagonal(statistics.moments, axis1=1, axis2=2).copy())


def dequantized(quantized, planes=1):
    """Codes times scales in float64, summed over the planes: (B, K, N)."""
    codes, scale = quantized.codes, quantized.scale.astype(np.float64)
    made = codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    return made.reshape(len(codes), planes, -1, codes.shape[2]).sum(axis=1)
