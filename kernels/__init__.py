"""Attention ops over pages. A leaf package: it knows tensors and integers and nothing else.

Each op lives in one file beside its fp32 torch twin, both with the same signature.
"""
