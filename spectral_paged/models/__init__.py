"""Transformers' models as the engine runs them: loading, geometry, calibration, decode graphs.

It knows the cache and the sampler, and no engine. Its modules are imported one by one, for some of
them bring transformers.
"""

__all__ = [
    "activation_memory",
    "attention_choice",
    "cache_for_model",
    "calibration",
    "checkpoint_files",
    "decode_graphs",
    "geometry",
    "kv_capture",
    "loader",
    "runner",
]
