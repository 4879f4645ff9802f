"""Families of operators, by what they do to a value that comes from the model's input."""

from __future__ import annotations

import onnx

from onnxcare.graph.view import operator

# They know shapes only, not values.
SHAPES = set("Shape Size".split())
# They take a part of their first input.
PICKS = set("Slice Gather GatherND GatherElements Split Compress ArrayFeatureExtractor".split())
# They answer true or false; OneHot asks a question for every class.
LOGIC = set("Equal Greater Less GreaterOrEqual LessOrEqual Not And Or Xor IsNaN IsInf OneHot Binarizer".split())
# They can be made to jump between two values.
STEPS = set("Sign Floor Ceil Round HardSigmoid Sigmoid Relu ThresholdedRelu Shrink Clip".split())
LINEAR = set("Conv ConvTranspose Gemm MatMul ConvInteger MatMulInteger QLinearConv QLinearMatMul Einsum".split())
# Where one of the operands decides, it decides about the others.
ELEMENTWISE = set(
    """
    Add Sub Mul Div Pow Mod Min Max Sum Mean Where Abs Neg Sqrt Exp Log Reciprocal Erf Tanh Softplus Softsign Elu Selu
    Celu LeakyRelu Gelu HardSwish Mish Swish Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot
    """.split()
)
SAME_SHAPE = {"Identity", "Cast", "CastLike", "Dropout", "Scaler", "Imputer", "QuantizeLinear", "DequantizeLinear"}
# They hand the values of a constant on.
CARRIERS = set("Identity Cast CastLike Reshape Squeeze Unsqueeze Expand Flatten Transpose".split())
# They number positions.
POSITIONS = set("Range NonZero CumSum".split())
# What is true of all values, or of any, is still a truth; a number of true ones is not.
TRUTHFUL_REDUCTIONS = {"ReduceMin", "ReduceMax", "ReduceProd", "GlobalMaxPool"}

_MOVES = set(
    """
    Tile Pad Concat DepthToSpace SpaceToDepth Resize Upsample Trilu ReverseSequence ScatterND ScatterElements Scatter
    BatchNormalization MaxPool AveragePool LpPool FeatureVectorizer
    """.split()
)
_KNOWN = SHAPES | PICKS | LOGIC | STEPS | LINEAR | ELEMENTWISE | SAME_SHAPE | CARRIERS | POSITIONS | _MOVES


def kind(node: onnx.NodeProto) -> str:
    """Return the name of an operator of ONNX or of ONNX-ML, or nothing."""
    return node.op_type if node.domain == "ai.onnx.ml" else operator(node)


def reduces(name: str) -> bool:
    """Return whether the operator makes one value out of many."""
    return name.startswith(("Reduce", "ArgM", "Global"))


def is_known(node: onnx.NodeProto) -> bool:
    """Return whether raw values stay raw behind the operator: it neither learns nor hides anything."""
    return kind(node) in _KNOWN or reduces(kind(node))
