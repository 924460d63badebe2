"""Where Modal has these names."""

from mesh.unbuilt import Queue

__all__ = ["Queue"]
