"""Whole parameter trees: selectors, leaves in their boxes, packing, the report of it."""
