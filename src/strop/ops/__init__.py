"""The operations that a loss is made of, one function each, in plain torch for any device.

Shapes: N trained tokens, H hidden size, V vocabulary, T packed tokens, S sequences, P pairs.
"""

from strop.ops.reference import TokenStats, linear_logprob, logprob, segment_sum

__all__ = ["TokenStats", "linear_logprob", "logprob", "segment_sum"]
