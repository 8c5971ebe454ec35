"""Transformers models run for the engine: loading, geometry, calibration, decode graphs.

The package imports the cache and the sampler, and no engine. Its modules are imported separately,
because some of them import transformers.
"""

__all__ = [
    "activation_memory",
    "attention_choice",
    "cache_for_model",
    "calibration",
    "checkpoint_files",
    "decode_graphs",
    "fp8_linear",
    "generation",
    "geometry",
    "gguf",
    "given_model",
    "hub",
    "kept_files",
    "linear_weights",
    "loader",
    "lora",
    "option_checks",
    "ready_model",
    "runner",
    "static_inputs",
    "stored_tensors",
    "weight_copies",
    "weight_quantization",
    "weights_digest",
]
