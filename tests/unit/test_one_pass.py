"""A micro batch whose head is taken in parts, beside the same one taken whole: every algorithm, loss, metric
and gradient. What a step makes of it is in tests/dist/test_one_pass.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from strop import algos
from strop.algos import LARGEST, SMALLEST
from strop.config import Config, DpoConfig, KtoConfig
from strop.data.batch import Batch, make_batch
from strop.data.store import TokenisedRow, TokenStore
from strop.models.policy import PartLoss, Policy
from strop.ops import functional, head, preference
from tests.unit.test_policy import SIZES, build, packed_batch
from tests.unit.test_shared_prefix import pair

CPU = torch.device("cpu")
FACTOR = 0.37
"""What the loop multiplies a loss with."""
COMPLETIONS = [(3, 8), (6, 2), (1, 1), (12, 10), (5, 5), (2, 9), (30, 1), (4, 4)]
"""Trained tokens of chosen and rejected: the fourth pair fits alone, the seventh does not."""
MOST = 24
"""Rows of the head whose exponentials may be kept."""
CASES = [
    *[("dpo", {"dpo": DpoConfig(loss=kind, label_smoothing=0.1)}, shared)
      for kind in preference.KINDS for shared in (False, True)],
    ("dpo", {"dpo": DpoConfig(sft_loss_weight=0.5, average_log_probs=True)}, True),
    ("kto", {}, False),
    ("kto", {"kto": KtoConfig(desirable_weight=1.5, beta=0.3)}, False),
    ("sft", {}, False),
    ("cpt", {}, False),
]  # fmt: skip


def config_of(algo, sections):
    return Config(**{"algo": algo, **sections})


def batch_of(algo, tmp_path, shared=False):
    """Rows of the algorithm, with reference log-probs, labels and a baseline where it wants them."""
    if algo == "cpt":  # two rows, of three and two documents
        return dataclasses.replace(packed_batch((40, 1, 14, 33, 2)), rows=np.arange(2))
    draw = np.random.default_rng(1)
    rows = []
    for i, lengths in enumerate(COMPLETIONS):
        prompt = draw.integers(3, 120, 2 + i)
        sides = [np.concatenate([prompt, draw.integers(3, 120, n)]) for n in lengths]
        sides[1][2 + i] = (sides[0][2 + i] + 1) % 120
        if algo == "dpo":
            rows.append(pair(*sides, (2 + i, 2 + i)))
        else:
            rows.append(TokenisedRow("a", i, [(sides[0], np.arange(len(sides[0])) >= 2 + i)], float(i % 2)))
    kind = "preference" if algo == "dpo" else "unpaired" if algo == "kto" else "sft"
    store = TokenStore.write(tmp_path / "s", iter(rows), kind=kind, digest="x")
    ref = -3 * draw.random(int(store.offsets[-1]), dtype=np.float32)
    store = store.sharing_prompts() if shared else store
    batch = make_batch(store, np.arange(store.num_rows), ref if algo in ("dpo", "kto") else None)
    return dataclasses.replace(batch, baseline=0.2)


@pytest.fixture
def policy():
    policy = Policy(build("llama", SIZES | {"tie_word_embeddings": True})).eval()
    policy.set_layout("packed", CPU)
    return policy


@pytest.fixture
def parts(monkeypatch):
    """parts(most): the head keeps at most so many rows, and parts pay however few. None: everything."""

    def choose(most, element_size=4):
        monkeypatch.setattr(head, "KEPT_BYTES", 2**40 if most is None else most * 120 * element_size)
        monkeypatch.setattr(functional, "ROWS_PER_PART", {"cpu": 0})

    return choose


def taken(policy, algo, config, batch):
    """(loss, metrics, gradients, sizes of the parts) of a batch, as the loop takes it."""
    algorithm = algos.load(algo)
    sizes = []

    def of(out, part):
        sizes.append(len(part.tokens_T))
        return algorithm.loss(out, part, config)[0] * FACTOR

    policy.zero_grad()
    out = policy(batch, PartLoss(of, None if algorithm.per_token else batch.row_edges()))
    assert (out.loss is None) == (not sizes)
    loss, metrics = algorithm.loss(out, batch, config)
    scaled = loss * FACTOR if out.loss is None else out.loss
    assert float(scaled.detach()) == pytest.approx(FACTOR * float(loss.detach()), rel=1e-5)
    scaled.backward()
    assert not any(m is SMALLEST or m is LARGEST for _, m in metrics.values())
    numbers = {name: (float(a), float(b)) for name, (a, b) in metrics.items()}
    grads = {name: p.grad.double() for name, p in policy.named_parameters() if p.grad is not None}
    return loss.detach(), numbers, grads, sizes


def in_fp64(policy, algo, config, batch):
    """Gradients by the same model and loss in fp64, which the kernels do not know."""
    policy.double()
    wide = dataclasses.replace(
        batch, ref_logp_T=None if batch.ref_logp_T is None else batch.ref_logp_T.double()
    )
    found = taken(policy, algo, config, wide)[2]
    policy.float()
    return found


def largest_error(found, expected):
    """Relative to each tensor's largest number."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items() if g.abs().max() > 0
    )


@pytest.mark.parametrize(("algo", "sections", "shared"), CASES)
def test_parts_are_the_whole(policy, parts, tmp_path, algo, sections, shared):
    config, batch = config_of(algo, sections), batch_of(algo, tmp_path, shared)
    parts(None)
    loss, metrics, grads, sizes = taken(policy, algo, config, batch)
    assert sizes == []
    parts(MOST)
    own_loss, own_metrics, own_grads, own_sizes = taken(policy, algo, config, batch)
    total = int(batch.trained_T.sum())
    assert sum(own_sizes) == total
    if algo in ("sft", "cpt"):
        assert own_sizes == [MOST] * (total // MOST) + [total % MOST] * (total % MOST > 0)
    elif algo == "dpo":  # of whole pairs; (30, 1) is too large
        assert own_sizes == [21, 22, 21, 31, 8]
    else:
        assert own_sizes == [22, 7, 30, 4]
    assert torch.allclose(own_loss, loss, rtol=1e-6)
    for name, pair_of in metrics.items():
        assert own_metrics[name] == pytest.approx(pair_of, rel=1e-5, abs=1e-6), name
    assert largest_error(own_grads, grads) < 1e-5
    right = in_fp64(policy, algo, config, batch)
    assert largest_error(own_grads, right) < max(1e-5, 2 * largest_error(grads, right))


@pytest.mark.parametrize("algo", ["dpo", "sft", "kto"])
def test_in_bf16_the_gradient_is_no_further_from_fp64(policy, parts, tmp_path, algo):
    """Goal 3 of the kernels: at most twice the error of the ordinary way."""
    config, batch = config_of(algo, {}), batch_of(algo, tmp_path)
    policy.bfloat16()
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    found = []
    for most in (None, MOST):
        parts(most, 2)
        found.append(taken(policy, algo, config, batch))
    (loss, metrics, grads, _), (own_loss, own_metrics, own_grads, sizes) = found
    assert len(sizes) >= 3
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-2)
    for name, (total, count) in metrics.items():
        assert own_metrics[name] == pytest.approx((total, count), rel=2e-2, abs=2e-2 * count), name
    right = in_fp64(policy, algo, config, batch)
    assert all(torch.equal(p.double(), weights[n].double()) for n, p in policy.named_parameters())
    for name, g in right.items():
        ordinary, own = (float((found[name] - g).norm() / g.norm()) for found in (grads, own_grads))
        assert own < 2 * ordinary + 1e-4, name


def test_who_is_never_taken_in_parts(policy, parts, tmp_path):
    """Without a gradient, with a frozen head, with a head that is no matrix, with a batch that fits."""
    config, batch = config_of("sft", {}), batch_of("sft", tmp_path)
    total = int(batch.trained_T.sum())
    parts(total)
    assert taken(policy, "sft", config, batch)[3] == []
    parts(total - 1)
    assert taken(policy, "sft", config, batch)[3] == [total - 1, 1]
    loss = PartLoss(lambda out, part: out.logp_T.sum(), None)
    with torch.no_grad():
        assert policy(batch, loss).loss is None
    policy.head = "logits"
    assert policy(batch, loss).loss is None
    policy.head = "fused"
    policy.lm.get_output_embeddings().weight.requires_grad_(False)
    assert policy(batch, loss).loss is None


def test_parts_that_are_too_small_do_not_pay(policy, parts, tmp_path, monkeypatch):
    """Each of them adds its gradient of the weight to the others'."""
    batch = batch_of("sft", tmp_path)
    total = int(batch.trained_T.sum())
    parts(MOST)
    for least, taken_in_parts in ((12, True), (total / 3, False)):
        monkeypatch.setattr(functional, "ROWS_PER_PART", {"cpu": least})
        out = policy(batch, PartLoss(lambda out, part: out.logp_T.sum(), None))
        assert (out.loss is not None) == taken_in_parts


def test_a_batch_and_its_parts_by_hand():
    """Two pairs; trained are 4, 5 | 7, 8, 9 and 11 | 13."""
    batch = Batch(
        tokens_T=torch.arange(14),
        positions_T=torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 0, 1]),
        cu_seqlens=torch.tensor([0, 6, 10, 12, 14], dtype=torch.int32),
        trained_T=torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1]) == 1,
        rows=np.array([7, 3]),
        max_seqlen=6,
        ref_logp_T=torch.arange(14.0) / 10,
        value_R=torch.tensor([0.5, 0.25]),
    )
    assert batch.row_edges() == [0, 5, 7]
    trained = batch.trained_only(batch.trained_T.nonzero()[:, 0])
    assert trained.tokens_T.tolist() == [4, 5, 7, 8, 9, 11, 13]
    assert trained.cu_seqlens.tolist() == [0, 2, 5, 6, 7]
    assert trained.trained_T.all()
    last = trained.part(slice(5, 7), slice(1, 2))
    assert (last.tokens_T.tolist(), last.cu_seqlens.tolist()) == ([11, 13], [0, 1, 2])
    assert (last.rows.tolist(), last.value_R.tolist()) == ([3], [0.25])
    assert torch.allclose(last.ref_logp_T, torch.tensor([1.1, 1.3]))
    cut = trained.part(slice(1, 6), slice(0, 2))
    assert (cut.tokens_T.tolist(), cut.cu_seqlens.tolist()) == ([5, 7, 8, 9, 11], [0, 1, 4, 5, 5])
