"""The parts of bodies: they take no other fields than their own, and no values of another type."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A part of a body, which takes no other fields, and no values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
