"""One kernel of a checkpoint: from its stored form to what a decoder holds."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._packed.pack import pack
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._packed.trits import ZEROS
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax.models import _codes, _grid
from bitnet_jax.models._keys import WHO
from bitnet_jax.models._pretrained import DECLARED, Options
from bitnet_jax.models._published import Stored
from bitnet_jax.models._report import LoadedKernel


class Kernel(NamedTuple):
    """A kernel as it is held, how it quantises, and how that came about."""

    value: Any
    config: KernelConfig | None
    why: str


def refuse_tensor(name: str, what: str, remedy: str) -> NoReturn:
    """Reports a tensor that does not fit."""
    raise ValueError(f"{WHO}: {name!r} {what}. {remedy}")


def require_shape(name: str, array: np.ndarray, wanted: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape than the config says."""
    if array.shape != wanted:
        refuse_tensor(
            name,
            f"has shape {array.shape}, and config.json makes it {wanted}",
            "Check that both are of one checkpoint.",
        )


def require_floats(name: str, array: np.ndarray, said: str) -> None:
    """Refuses a tensor that is not of floats, or that is not finite."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        refuse_tensor(
            name,
            f"is {array.dtype.name}, and the config ({said}) means floats",
            "Packed weights need quantization_mode offline; pass quantization_config= with "
            "what the publisher says.",
        )
    bad = int(np.count_nonzero(~np.isfinite(array.astype(np.float32))))
    if bad:
        refuse_tensor(name, f"has {bad} NaN or Inf", "Download the checkpoint again.")


def scale_of(name: str, array: np.ndarray, stored: Stored) -> np.float32:
    """What outputs are multiplied by, from a stored weight_scale."""
    require_floats(name, array, "weight_scale")
    if array.size != 1:
        refuse_tensor(name, f"has {array.size} values, and one is needed", "Download it again.")
    value = array.astype(np.float32).reshape(())
    usable = np.isfinite(value) and value > 0
    scale = np.float32(1) / value if usable and stored == "divide" else value
    if not (usable and np.isfinite(scale) and scale > 0):
        refuse_tensor(name, f"is {value}, which no scale can be", "Download it again.")
    return np.float32(scale)


def from_offline(
    name: str, packed: np.ndarray, scale: np.float32, n_in: int, n_out: int, dtype: Any
) -> PackedTernary:
    """A kernel of packed bytes."""
    if packed.dtype != np.uint8:
        refuse_tensor(
            name,
            f"is {packed.dtype.name}, and the config (offline) means packed uint8 codes",
            "Float weights need linear_class autobitlinear and quantization_mode online; pass "
            "quantization_config= with what the publisher says.",
        )
    if n_out % 4:
        refuse_tensor(
            name,
            f"has {n_out} outputs, which this format cannot pack four to a byte",
            "Publish the checkpoint with float weights.",
        )
    require_shape(name, packed, (n_out // 4, n_in))
    threes = _codes.count_threes(packed)
    if threes:
        refuse_tensor(name, f"holds the code 3 in {threes} bytes", "Download it again.")
    return PackedTernary(
        jnp.asarray(_codes.from_huggingface(packed)),
        jnp.asarray(scale).reshape(1, 1),
        length=n_in,
        config=B158,
        dtype=np.dtype(dtype),
    )


def from_floats(name: str, w: np.ndarray, wanted: KernelConfig | None, *, packed: bool) -> Kernel:
    """A float kernel (out, in): quantised as asked for, or float.

    Args:
      name: of the tensor.
      w: (out, in).
      wanted: the quantiser; None: float.
      packed: whether to hold it packed.
    """
    odd = _oddness(name, w)
    kernel = jnp.asarray(w.T)
    if wanted is None or not packed:
        return Kernel(kernel, wanted, odd)
    return Kernel(pack(kernel, wanted), wanted, odd)


def detect(name: str, w: np.ndarray) -> Kernel | None:
    """A float kernel (out, in) that is on a ternary grid, packed; None if it is not."""
    found = None if _oddness(name, w) else _grid.find(w)
    if found is None:
        return None
    granularity = found.config.granularity
    each = f"each {granularity} inputs" if isinstance(granularity, int) else f"a {granularity}"
    return Kernel(found, found.config, f"trits times a scale for {each}, exactly")


def _oddness(name: str, w: np.ndarray) -> str:
    """What is odd about weights that are finite, and warned of; empty where nothing is."""
    low, high = w.min(), w.max()
    if low != high:
        return ""
    what = "all zero" if low == 0 else "all the same"
    warnings.warn(f"{WHO}: the weights of {name!r} are {what}.", UserWarning, stacklevel=2)
    return what


def oddness_of_codes(name: str, packed: PackedTernary) -> str:
    """As for floats, of packed codes."""
    if bool((np.asarray(packed.codes) != ZEROS).any()):
        return ""
    warnings.warn(f"{WHO}: the weights of {name!r} are all zero.", UserWarning, stacklevel=2)
    return "all zero"


def table(name: str, w: np.ndarray, wanted: KernelConfig | None, *, packed: bool) -> Kernel:
    """An embedding (vocabulary, features): as asked for, or on its grid, or float."""
    odd = _oddness(name, w)
    if wanted is None or not packed:
        return Kernel(jnp.asarray(w), wanted, odd)
    return Kernel(pack(jnp.asarray(w), wanted, contracting_axes=-1), wanted, odd)


def turned(packed: PackedTernary) -> PackedTernary:
    """A packed (in, out) kernel as a table (out, in), packed along the features too."""
    return PackedTernary(
        packed.codes.T,
        packed.scale.T,
        length=packed.length,
        contracting_axes=(-1,),
        config=packed.config,
        dtype=packed.dtype,
    )


def activations(
    options: Options, declared: ActivationConfig | None, kinds: Mapping[str, KernelConfig | None]
) -> ActivationConfig | None:
    """What meets the projections: as asked for, as declared, or int8 where it was float.

    Int8 where ``weights=`` quantised a projection of a checkpoint that declares none: a
    weight-only product would be slower than the float one.
    """
    if options.activations != DECLARED:
        return options.activations
    quantised = options.weights is not None and options.weights in kinds.values()
    return INT8 if declared is None and quantised else declared


def decided(kinds: Mapping[str, KernelConfig | None]) -> dict[str, Any]:
    """The config's ``weights`` and ``overrides``, from the quantiser of each projection."""
    counts = collections.Counter(kinds.values())
    common = counts.most_common(1)[0][0]
    others = tuple((path, config) for path, config in kinds.items() if config != common)
    return {"weights": common, "overrides": others}


def row(path: str, source: str, kernel: Kernel) -> LoadedKernel:
    """A line of the report."""
    value = kernel.value
    kind = "float"
    if is_packed(value) or kernel.config is not None:
        int8 = isinstance(value, PackedInt8) or isinstance(kernel.config, Int8Config)
        kind = "int8" if int8 else "ternary"
    nbytes = value.nbytes if is_packed(value) or isinstance(value, jax.Array) else 0
    return LoadedKernel(path, source, tuple(value.shape), kind, nbytes, kernel.why)
