"""Quality as whole engines serve it: this engine, vLLM, and pages inside vLLM."""

__all__ = [
    "run",
]
