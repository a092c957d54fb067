"""Weights in int8 and int4, for inference.

quantize(model, "int4")   # linear layers in place; returns a table of formats, bits and bytes
dequantize(model)         # linear layers again, with rounded weights
"""

from flashmla_ops.quant.linear import QuantizedLinear
from flashmla_ops.quant.model import dequantize, quantize
from flashmla_ops.quant.report import Layer, Report, explain, report

__all__ = ["Layer", "QuantizedLinear", "Report", "dequantize", "explain", "quantize", "report"]
