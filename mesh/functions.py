"""Where Modal has these names: `modal.functions.FunctionCall` and the like keep working."""

from mesh.sdk import Function, FunctionCall

__all__ = ["Function", "FunctionCall"]
