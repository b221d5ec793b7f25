"""The operations that a loss is made of, one function each, for any device.

Each has a reference in plain torch and native kernels (csrc/, one shared library a device type) behind the
one function, which takes what fits its tensors; see `functional` for the functions, `head` for how the
logits [N, V] are avoided, `native` for the libraries.
"""

from strop.ops.functional import (
    TokenStats,
    backend,
    dpo_loss,
    linear_logprob,
    linear_loss,
    logprob,
    one_pass_pays,
    segment_sum,
)

__all__ = [
    "TokenStats",
    "backend",
    "dpo_loss",
    "linear_logprob",
    "linear_loss",
    "logprob",
    "one_pass_pays",
    "segment_sum",
]
