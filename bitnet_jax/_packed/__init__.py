"""Packed kernels as pytree nodes: the bit layout, packing and unpacking, adapters beside them."""
