"""Base of every group of keys in a recipe."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


__all__ = ["Settings"]
