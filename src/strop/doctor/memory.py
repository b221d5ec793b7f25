"""How much memory one rank needs, and how much disk the checkpoints: arithmetic, no machine is asked.

    P parameters, R ranks that share them, c bytes of the compute type, T tokens of a micro batch
    weights, AdamW        4P/R + 8P/R              fp32 shards
    gradients             4P + 4P/R, or 4P/R       whole over a step's micro batches up to
                                                   parallel.WHOLE_GRADIENT_BYTES, else reduced each time
    gathered              c (root + 2 blocks)      the root stays, the next block comes while one computes
    block's gradient      (c + 4) block            before and while it is reduced
    activations           T (L a + b)              see `activation_bytes`

One rank on a CPU uses its fp32 weights as they are (models.whole), in 16 bit those of models that allow it:
nothing is gathered, and gradients are 4P.

With adapters (LoRA) the weights that stay frozen take c bytes each and nothing else, and P is in the other
lines what is trained; A's inputs live until the backward as those of trained weights do.

Weights and moments are exact, the other states what the trainer allocates, activations those of blocks of
the Llama kind. A checkpoint holds weights and both moments in fp32, 12P bytes; measured 0.2 %
more (SmolLM2-135M, two ranks). A CPU's allocator keeps more than is asked of it: there the measured peak
of that run was 3.15 GiB a rank for an estimate of 2.30, after a step 2.43.
"""

from __future__ import annotations

from dataclasses import dataclass

from strop.doctor.model import Shape
from strop.ops.head import CHUNK_BYTES, KEPT_BYTES, TIMES_ON_CUDA, most_kept_fused
from strop.parallel import WHOLE_GRADIENT_BYTES

COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GPU_FRAMEWORK_BYTES = int(1.5 * 2**30)
"""CUDA context, NCCL's buffers, what the allocator cannot use."""
CPU_FRAMEWORK_BYTES = int(0.5 * 2**30)
"""Python with torch and transformers imported, measured (0.5 GiB resident)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a training step."""

    weights: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    head: int
    """What the forward keeps of the logits, and a chunk of them, see ops.linear_logprob; a reward model's
    scores take nothing."""
    framework: int
    host_staging: int
    """Main memory for an asynchronous checkpoint: a copy of this rank's shards. On a CPU part of the rank."""
    loading: int
    """Main memory of rank 0 while it reads the weights: the files' content, and the largest tensor fp32."""

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.optimizer + self.gradients + self.gathered

    @property
    def total(self) -> int:
        return self.states + self.activations + self.head + self.framework


def estimate(
    shape: Shape,
    *,
    num_ranks: int,
    micro_batch_tokens: int,
    precision: str,
    activation_checkpointing: str,
    gpu: bool,
) -> Memory:
    """`num_ranks`: those that share one copy of the weights. micro_batch_tokens: of the largest batch."""
    c = COMPUTE_BYTES[precision]
    p = shape.num_params if shape.num_trained is None else shape.num_trained
    frozen = 0 if shape.num_trained is None else shape.num_params
    share, frozen_share = -(-p // num_ranks), -(-frozen // num_ranks)
    whole = 4 * p + c * frozen <= WHOLE_GRADIENT_BYTES
    block = min(shape.block_params or p, p)
    tokens = micro_batch_tokens
    in_place = num_ranks == 1 and not gpu and not frozen and (c == 4 or shape.is_known)
    if in_place:
        gradients, gathered = 4 * p, 0
    else:
        gradients = 4 * share + (4 * p if whole else (c + 4) * block)
        gathered = c * (shape.root_params + 2 * shape.block_params)
    return Memory(
        weights=4 * share + c * frozen_share,
        optimizer=8 * share,
        gradients=gradients,
        gathered=gathered,
        activations=tokens * activation_bytes(shape, c, activation_checkpointing),
        head=0 if shape.scores else _head_bytes(shape, tokens, c, gpu),
        framework=GPU_FRAMEWORK_BYTES if gpu else CPU_FRAMEWORK_BYTES,
        host_staging=12 * share,
        loading=shape.file_bytes + 4 * shape.vocab_size * shape.hidden,
    )


def _head_bytes(shape: Shape, tokens: int, c: int, gpu: bool) -> int:
    """All tokens may be trained ones. Beside the exponentials, of which a CPU keeps as many as it may, stands
    a maximum for every 12 of them."""
    kept = c * tokens * shape.vocab_size
    if gpu:
        kept = kept if kept <= KEPT_BYTES * TIMES_ON_CUDA else 0
    else:
        kept = min(kept, most_kept_fused(c * shape.vocab_size * shape.hidden))
    kept += kept // 12
    return kept + 2 * CHUNK_BYTES["cuda" if gpu else "cpu"] + 2 * 4 * tokens * shape.hidden


def activation_bytes(shape: Shape, c: int, mode: str) -> int:
    """Bytes a token that live until the backward, all blocks together.

    A block of the Llama kind keeps, in the compute type: of each norm the normalised input and the result
    (4h), q and attention's output (2h), k and v, gate, its activation, up and their product (4i); and each
    norm's input in fp32. `selective` keeps the block's input and the results of matmuls and attention only;
    `full` the input, and one block's everything while it is done again.
    """
    h, i, kv = shape.hidden, shape.intermediate, shape.kv_hidden
    everything = c * (6 * h + 2 * kv + 4 * i) + 2 * 4 * h
    results = c * (5 * h + 2 * kv + 2 * i)
    blocks = max(1, shape.num_blocks)
    if mode == "none":
        return blocks * everything
    kept = results if mode == "selective" else c * h
    return blocks * kept + everything


def checkpoint_bytes(shape: Shape) -> int:
    return 12 * (shape.num_params if shape.num_trained is None else shape.num_trained)


def disk_bytes(shape: Shape, keep_last: int, has_best: bool) -> int:
    """The checkpoints that are kept, the best one, and the one being written."""
    return checkpoint_bytes(shape) * (keep_last + 1 + has_best)
