"""The training op: integer products and convolutions, the epilogue, gathers of codes."""
