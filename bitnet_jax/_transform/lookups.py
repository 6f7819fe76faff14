"""Where rows of a table are looked up: ``gather``, from an int8 embedding.

A row has one scale, so the features are what a table contracts over, as where it is attended.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from bitnet_jax._layers.forward import embed_lookup
from bitnet_jax._quantize.straight_through import fake_quantize
from bitnet_jax._quantize.strength import ambient
from bitnet_jax._transform.jaxprs import Eqn, dtype_of
from bitnet_jax._transform.layout import Value, is_float
from bitnet_jax._transform.site import Site
from bitnet_jax._transform.view import View


class LookupPlan(NamedTuple):
    """A ``gather`` of whole rows; see ``site.Plan``.

    Attributes:
      view: of the table.
      contracting: the leaf's axes that a row has: its features.
      batch: the leaf's axes that were mapped.
    """

    view: View
    contracting: tuple[int, ...]
    batch: tuple[int, ...]

    @property
    def has_rows(self) -> bool:
        """Whether it is a table (vocabulary, features), whose rows can be read packed."""
        return not self.batch and len(self.view.shape) == 2 and self.view.is_plain

    def run(self, site: Site, x: jax.Array, value: Value) -> jax.Array:
        """The rows, from an int8 table."""
        if not is_float(value):
            return self._stored_rows(site, x, value)
        view = self.view
        table = fake_quantize(
            value,
            site.chosen.config.weights,
            contracting_axes=tuple(map(view.position, self.contracting)),
            batch_axes=tuple(map(view.position, self.batch)),
            strength=ambient(site.strength),
        )
        eqn = site.eqn
        params = eqn.primitive.get_bind_params(eqn.params)
        # Rows are cast, not the table: the gradients of a row that is taken twice add up in its
        # own dtype.
        rows = eqn.primitive.bind(view._replace(dtypes=()).shown(table), x, **params)
        for dtype in view.dtypes:
            rows = rows.astype(dtype)
        return rows

    def _stored_rows(self, site: Site, index: jax.Array, value: Value) -> jax.Array:
        eqn, chosen = site.eqn, site.chosen
        numbers, dtype = eqn.params["dimension_numbers"], dtype_of(eqn.outvars[0])
        if not self.has_rows:
            raise_not_rows(chosen.where)
        # As the program has the table: a prepared one has its axes in another order.
        rows = self.view.shape[0]
        at = index[..., 0].astype(jnp.int32)
        if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            # Here a negative index is as far out as one too large: it is not counted from the end.
            at = jnp.where(at < 0, rows, at)
        else:
            at = jnp.clip(at, 0, rows - 1)
        y = embed_lookup(chosen.where, chosen.config.weights, value, at, dtype, None)
        return jnp.moveaxis(y, -1, numbers.offset_dims[0])


def plan_lookup(eqn: Eqn, side: int, view: View) -> LookupPlan | str:
    """How a ``gather`` looks rows up in the table that is its operand ``side``, or why not."""
    if side != 0:
        return "it is the index of a gather"
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    single = numbers.collapsed_slice_dims
    mapped = tuple(numbers.operand_batching_dims)
    rows = all(n == view.shape[a] for a, n in enumerate(sizes) if a not in (*single, *mapped))
    if not rows or tuple(single) != tuple(numbers.start_index_map) or not single:
        return "`gather` takes windows of it"
    axes = [view.whole(a) for a in range(view.ndim)]
    if any(axis is None for axis in axes):
        return "`gather` takes a part of its axes"
    features = [axes[a] for a in range(view.ndim) if a not in (*single, *mapped)]
    if not features:
        return "`gather` takes single weights of it"
    cut = view.cut & {*features}
    if cut:
        return f"only a part of its axis {min(cut)} is taken"
    batch = tuple(sorted(axes[a] for a in mapped))  # pyright: ignore[reportArgumentType]
    return LookupPlan(view, tuple(sorted(features)), batch)  # pyright: ignore[reportArgumentType]


def raise_not_rows(path: str) -> NoReturn:
    """Refuses a look-up in a packed table that is not (vocabulary, features)."""
    raise NotImplementedError(
        f"ternarize: the table at {path} cannot be packed: rows are looked up in packed tables "
        "(vocabulary, features) as they are stored, and not in stacks or views of them. Leave it "
        "in float (select=)."
    )
