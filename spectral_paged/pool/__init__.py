"""The pool hands out slots by id, and knows the bytes of each: slot pool, arena and block tables.

The package imports page formats, devices and the page layout of kernels. `slot_pool` loads without
torch, so this file imports nothing.
"""

__all__ = [
    "arena",
    "block_table",
    "slot_pool",
    "weak_method",
]
