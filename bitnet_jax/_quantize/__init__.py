"""Quantisers on arrays: ternary kernels, int8 codes, straight-through estimators, strength."""
