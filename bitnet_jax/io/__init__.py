"""Models in files.

:func:`save` and :func:`load` keep a parameter tree, packed kernels included, in
one safetensors file that is refused when one bit of it has changed.

>>> import os, tempfile, jax, bitnet_jax as bj
>>> params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
>>> packed, report = bj.pack_params(params)
>>> with tempfile.TemporaryDirectory() as folder:
...     bj.io.save(os.path.join(folder, "model.bitnet.safetensors"), packed)
...     bj.io.load(os.path.join(folder, "model.bitnet.safetensors"))
{'layer': {'kernel': PackedTernary(shape=(64, 16), scale=(1, 1), 260 bytes)}}
"""

from bitnet_jax.io._checkpoint import abstract, check, describe
from bitnet_jax.io._file import load, save
from bitnet_jax.io._safetensors import FormatError

__all__ = ["FormatError", "abstract", "check", "describe", "load", "save"]
