"""ONNX graphs rewritten for onnxruntime: operators that it has no fast kernel for become ones that it has, exactly.

Each rule is an identity of real numbers; what rounding makes of it is bounded in the tests and checked on every test
image after each export.
"""

from typing import Any

import onnx
from onnxscript import rewriter
from onnxscript.rewriter import pattern

CUT = 20.0  # from there on mish(x) == x in float32


def _mish(op: Any, x: Any) -> Any:
    return op.Mish(x)


def _mish_by_one_exponential(op: Any, x: Any) -> Any:
    """X * tanh(softplus(x)) = x * n / (n + 2), where n = e * (e + 2) and e = exp(x)."""
    two = op.Constant(value_float=2.0)
    e = op.Exp(op.Min(x, op.Constant(value_float=CUT)))
    n = op.Mul(e, op.Add(e, two))
    return op.Mul(x, op.Div(n, op.Add(n, two)))


# onnxruntime's Mish on CPU takes twice the time of all that surrounds it.
RULES = pattern.RewriteRuleSet([pattern.RewriteRule(_mish, _mish_by_one_exponential)])


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function of the same inputs; a new model."""
    rewritten: onnx.ModelProto = rewriter.rewrite(model, RULES)
    return rewritten
