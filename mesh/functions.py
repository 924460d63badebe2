"""Where Modal has these names: `modal.functions.FunctionCall` and the like keep working."""

from mesh.call import FunctionCall
from mesh.sdk import Function
from mesh.stats import FunctionAutoscalerSettings, FunctionStats

__all__ = ["Function", "FunctionAutoscalerSettings", "FunctionCall", "FunctionStats"]
