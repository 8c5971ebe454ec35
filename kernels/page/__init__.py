"""Where the bytes of a page lie, and how they are read."""

__all__ = [
    "bit_packing",
    "layout",
    "triton",
    "view",
]
