"""Who owns which slot, and which bytes a slot is: ids, an arena and block tables.

It knows page formats, devices and the page layout of kernels. `slot_pool` loads without torch, so
nothing is imported here.
"""

__all__ = [
    "arena",
    "block_table",
    "slot_pool",
    "weak_method",
]
