"""The parts of decode attention with explicit layouts, in Gluon."""

__all__ = ["apply", "attend", "operands", "project", "project_shared", "scores", "tiles"]
