"""Memory that training takes on each device of a mesh, computed from shapes alone.

Counted, for a tree of parameters sharded by ``PartitionSpec``\\ s::

    parameters, gradients       this device's shards
    optimizer's state           what ``init`` allocates for the shards
    saved for the backward pass of each ternary contraction: x's codes (int8) and gammas
                                (float32, one for a token, or one for each of its groups), the
                                kernel's codes (int8, the shard) and its scale
    gathered                    the codes of each kernel under :func:`gather_codes`, once in
                                the forward pass and once in the backward pass

Not counted: attention scores, norms, activation functions, logits, float leaves that
XLA gathers, and XLA's temporaries. The peak is higher than the memory held: at least by
the largest kernel's gathered codes and by its gradient before the sum over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from bitnet_jax import _checks, _display, _mesh
from bitnet_jax._ops.gather import gather_of
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Stored, is_stored
from bitnet_jax._packed.pack import pack_quantized
from bitnet_jax._packed.stored import PackedTernary, with_planes
from bitnet_jax._quantize.int8 import (
    INT8,
    ActivationConfig,
    Int8Config,
    require_activation_groups,
)
from bitnet_jax._quantize.kernel_spec import KernelSpec
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax._tree.leaves import Leaf, flatten, rebox
from bitnet_jax._tree.params import chosen_leaves, spec_of_leaf
from bitnet_jax._tree.select import AxesOf, Path, Select, axes_for, names_of
from bitnet_jax.sharding import _partition_specs

Tokens = int | Callable[[Path, Any], int]

_FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training on one device, and of serving the whole model; ``str`` is a table.

    Attributes:
      devices: how many devices the mesh has.
      parameters: the float shards.
      gradients: the shards of the gradients.
      optimizer: the optimizer's state.
      saved: residuals of all ternary contractions, for the backward pass.
      largest_codes: the gathered codes of the largest kernel, int8.
      largest_gradient: that kernel's gradient before the sum over devices, float32.
      gathered: the gathered codes of all kernels, forward and backward pass together, as
        :func:`collectives` counts them.
      gathered_weights: the number of weights in ``gathered``.
      served_float16: the whole model in float16.
      served_int8: the selected kernels packed at eight bits; the other leaves unchanged.
      served_packed: the selected kernels packed by their config; the others unchanged.
    """

    devices: int
    parameters: int
    gradients: int
    optimizer: int
    saved: int
    largest_codes: int
    largest_gradient: int
    gathered: int
    gathered_weights: int
    served_float16: int
    served_int8: int
    served_packed: int

    @property
    def held(self) -> int:
        """Bytes held at the end of a forward pass: parameters, gradients, state, residuals."""
        return self.parameters + self.gradients + self.optimizer + self.saved

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """The lines of the table: a label and bytes."""
        return (
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer's state", self.optimizer),
            ("saved by ternary contractions", self.saved),
            ("held", self.held),
            ("largest kernel: gathered codes, int8", self.largest_codes),
            ("largest kernel: gradient before its sum", self.largest_gradient),
            ("gathered in a step: codes", self.gathered),
            ("    as bfloat16 kernels", 2 * self.gathered_weights),
            ("    as float32 kernels", 4 * self.gathered_weights),
            ("served, whole model: float16", self.served_float16),
            ("    int8", self.served_int8),
            ("    packed", self.served_packed),
        )

    def to_dict(self) -> dict[str, int]:
        """Every attribute and ``held``, as plain Python integers."""
        return dataclasses.asdict(self) | {"held": self.held}

    def __str__(self) -> str:
        """A table: one device, what it gathers in a step, the model to serve."""
        header = (f"on one of {self.devices} devices", "bytes")
        return _display.table(header, [(name, _display.size_text(n)) for name, n in self.rows])


def training_memory(
    params: PyTree,
    config: KernelConfig = B158,
    *,
    mesh: Mesh | AbstractMesh,
    optimizer: optax.GradientTransformation,
    tokens: Tokens,
    rules: _partition_specs.Rules | _partition_specs.SpecOf | None = None,
    select: Select | None = None,
    axes: AxesOf | None = None,
    activations: ActivationConfig = INT8,
) -> TrainingMemory:
    """The bytes that training takes on each device, and the bytes of the model to serve.

    Computed from shapes: nothing is allocated, and no device is needed. A table for 70
    billion parameters takes seconds, from ``jax.eval_shape(model.init, ...)`` and an
    ``AbstractMesh``. It assumes full quantisation (strength 1) and quantised activations; the
    other paths save floats.

    Call it inside :func:`gather_codes` if training will run inside it; else nothing is
    gathered. Gradients and the optimizer's state have the parameters' dtypes and
    shardings. Each contraction counts its own codes of x, although XLA may merge those of
    layers with the same input. A convolution counts every window, which is more than it
    saves. The first layer of a model gathers its codes once, not twice, if its input has
    no gradient. Blocks under ``nn.remat`` gather a third time, and save one block at a
    time.

    Args:
      params: a tree of float arrays or ``jax.ShapeDtypeStruct``, boxed or not.
      config: as for :func:`pack_params`.
      mesh: the mesh of the specs; a ``jax.sharding.AbstractMesh`` is enough.
      optimizer: an optax transformation.
      tokens: how many rows of x each kernel is multiplied with on one device; or a
        function of path and leaf, for experts that see some of the tokens. 0 means that
        the leaf is looked up, which saves and gathers no codes; that is the default for
        leaves named ``embedding``.
      rules: the shardings, as for :func:`partition_specs`; by default Flax's metadata.
      select: as for :func:`pack_params`.
      axes: as for :func:`pack_params`.
      activations: of all layers; with a ``group``, every token saves a gamma for each of its
        groups.

    Returns:
      A :class:`TrainingMemory`.

    Raises:
      TypeError: as :func:`pack_params`; a mesh, optimizer, count or activations of another
        type.
      ValueError: as :func:`pack_params` and :func:`partition_specs`; groups of activations
        that do not divide a contraction.

    Example:
      >>> import jax, optax, bitnet_jax as bj
      >>> from jax.sharding import AbstractMesh, PartitionSpec as P
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((4096, 11008), "float32")}}
      >>> mesh = AbstractMesh((8,), ("data",))
      >>> rules = [("kernel", P("data", None))]
      >>> how = {"mesh": mesh, "optimizer": optax.adamw(1e-3), "tokens": 4096}
      >>> with bj.sharding.gather_codes("data"):
      ...     print(bj.sharding.training_memory(params, rules=rules, **how))
      on one of 8 devices                         bytes
      parameters                                22.5 MB
      gradients                                 22.5 MB
      optimizer's state                         45.1 MB
      saved by ternary contractions             22.4 MB
      held                                     112.6 MB
      largest kernel: gathered codes, int8      45.1 MB
      largest kernel: gradient before its sum  180.4 MB
      gathered in a step: codes                 22.5 MB
          as bfloat16 kernels                  180.4 MB
          as float32 kernels                   360.7 MB
      served, whole model: float16              90.2 MB
          int8                                  45.1 MB
          packed                                11.3 MB
    """
    who = "training_memory"
    _checks.require_instance(
        who, "mesh", mesh, (Mesh, AbstractMesh), "Use jax.make_mesh((8,), ('data',))."
    )
    kind = optax.GradientTransformation
    _checks.require_instance(
        who, "optimizer", optimizer, kind, "Use for example optax.adamw(1e-3)."
    )
    remedy = "Use bj.ActivationConfig(). Float activations are not counted here."
    _checks.require_instance(who, "activations", activations, ActivationConfig, remedy)
    if not callable(tokens):
        _checks.require_instance(who, "tokens", tokens, int, "Count the tokens on one device.")
        _checks.require_positive(who, "tokens", tokens)
    mesh = mesh.abstract_mesh
    chosen, treedef = chosen_leaves(who, params, config, select)
    axes = axes_for(select, axes)
    specs = flatten(who, "specs", _partition_specs.partition_specs(params, rules, mesh=mesh))[0]
    shards, kernels, served = [], [], {16: 0, 8: 0, 2: 0}
    for (leaf, c), spec in zip(chosen, specs, strict=True):
        w = jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype)
        entries = _mesh.padded(spec.value, w.ndim)
        shards.append(jax.ShapeDtypeStruct(_cut(w.shape, entries, mesh), w.dtype))
        forms = [w, w]
        if c is not None:
            kernel = spec_of_leaf(who, leaf, c, axes)
            forms = [_packed(w, kernel._replace(config=Int8Config())), _packed(w, kernel)]
            rows = _rows(who, leaf, tokens)
            if rows:
                kernels.append(_kernel(who, forms[1], entries, mesh, rows, activations))
        served[16] += 2 * w.size
        served[8] += _nbytes(forms[0])
        served[2] += _nbytes(forms[1])
    boxed = [rebox(leaf.boxed, s) for (leaf, _), s in zip(chosen, shards, strict=True)]
    state = jax.eval_shape(optimizer.init, jax.tree.unflatten(treedef, boxed))
    parameters = sum(map(_nbytes, shards))
    largest = max((k.gathered_weights for k in kernels), default=0)
    return TrainingMemory(
        devices=math.prod(mesh.shape.values()),
        parameters=parameters,
        gradients=parameters,
        optimizer=sum(map(_nbytes, jax.tree.leaves(state))),
        saved=sum(k.saved for k in kernels),
        largest_codes=max((k.codes for k in kernels), default=0),
        largest_gradient=largest * _FLOAT32,
        gathered=2 * sum(k.gathered for k in kernels),
        gathered_weights=2 * sum(k.gathered_weights for k in kernels),
        served_float16=served[16],
        served_int8=served[8],
        served_packed=served[2],
    )


class _Kernel(NamedTuple):
    """One kernel on one device: saved bytes; gathered bytes, weights and codes of one pass."""

    saved: int
    gathered: int
    gathered_weights: int
    codes: int


def _kernel(
    who: str,
    packed: Stored,
    entries: _mesh.Spec,
    mesh: AbstractMesh,
    rows: int,
    activations: ActivationConfig,
) -> _Kernel:
    """What one contraction saves and gathers, by the same decisions as the training op."""
    batch, k, n = packed.axes.split(packed.shape)
    require_activation_groups(who, activations, k)
    parts = packed.axes.split(entries)
    gather = gather_of(
        who,
        (),
        parts,
        math.prod(k),
        explicit=mesh,
        given=True,
        two_bits=isinstance(packed, PackedTernary),
    )
    # The op sees (*batch, K, N): contracting and output axes are merged, and their mesh axes.
    shape = (*batch, math.prod(k), math.prod(n))
    merged = [tuple(a for e in part for a in _mesh.names(e)) for part in parts[1:]]
    shards = (*parts[0], *merged)
    whole = shards if gather is None else gather.whole
    *slices, depth, outputs = _cut(shape, whole, mesh)
    gammas = 1 if activations.group is None else math.prod(k) // activations.group
    (gammas,) = _cut((gammas,), _mesh.fit(whole[-2:-1], (gammas,), mesh), mesh)
    # A scale is sharded along its axes that the mesh divides.
    scale_entries = with_planes(entries, packed.plane_axis, None)
    scale_entries = _mesh.fit(scale_entries, packed.scale.shape, mesh)
    scale = math.prod(_cut(packed.scale.shape, scale_entries, mesh)) * _FLOAT32
    saved = rows * math.prod(slices) * (depth + gammas * _FLOAT32)
    saved += packed.planes * math.prod(_cut(shape, shards, mesh))
    if gather is None:
        return _Kernel(saved + scale, 0, 0, 0)
    weights = math.prod(slices) * depth * outputs
    codes = packed.planes * weights
    gathered = codes // (trits.PER_BYTE if gather.packs else 1)
    return _Kernel(saved + scale, gathered, weights, codes)


def _cut(shape: Sequence[int], entries: Iterable[_mesh.Entry], mesh: AbstractMesh) -> list[int]:
    """The shape of one shard."""
    return [
        length // math.prod(mesh.shape[a] for a in _mesh.names(entry))
        for length, entry in zip(shape, entries, strict=True)
    ]


@functools.cache
def _packed(w: jax.ShapeDtypeStruct, spec: KernelSpec) -> Stored:
    """The shapes of a packed kernel; a network has few different ones."""
    return jax.eval_shape(lambda w: pack_quantized(w, spec)[1], w)


def _rows(who: str, leaf: Leaf, tokens: Tokens) -> int:
    """How many rows of x one kernel is multiplied with on one device."""
    if not callable(tokens):
        return 0 if names_of(leaf.path)[-1] == "embedding" else tokens
    rows = tokens(leaf.path, leaf.value)
    _checks.require_instance(who, "tokens", rows, int, f"It was called with {leaf.where}.")
    return rows


def _nbytes(leaf: Stored | jax.ShapeDtypeStruct) -> int:
    """Bytes of a packed kernel, an array or a ``jax.ShapeDtypeStruct``."""
    return leaf.nbytes if is_stored(leaf) else leaf.size * leaf.dtype.itemsize
