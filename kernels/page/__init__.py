"""The places of a page's bytes, and the functions that read and write them."""

__all__ = [
    "bit_packing",
    "layout",
    "triton",
    "view",
]
