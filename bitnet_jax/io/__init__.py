"""Models in files: a parameter tree, packed kernels included, in one safetensors file.

:func:`save` writes it and :func:`load` reads it back bit-identical; a file in which one
bit has changed is refused. :func:`describe`, :func:`abstract` and :func:`check` do the
same for checkpoints that another library writes, Orbax for example.

>>> import os, tempfile, jax, bitnet_jax as bj
>>> params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
>>> packed, report = bj.pack_params(params)
>>> with tempfile.TemporaryDirectory() as folder:
...     bj.io.save(os.path.join(folder, "model.bitnet.safetensors"), packed)
...     bj.io.load(os.path.join(folder, "model.bitnet.safetensors"))
{'layer': {'kernel': PackedTernary(shape=(64, 16), scale=(1, 1), 260 bytes)}}
"""

from bitnet_jax.io._checkpoint import abstract, check, describe
from bitnet_jax.io._export_huggingface import export_huggingface
from bitnet_jax.io._file import load, save
from bitnet_jax.io._safetensors import FormatError

__all__ = ["FormatError", "abstract", "check", "describe", "export_huggingface", "load", "save"]
