"""The figures, against values worked out by hand and against a plain float64 implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eval.metrics import (
    CONFIDENCE_EDGES,
    Mean,
    delta_p,
    drift,
    kl_by_confidence,
    kl_divergence,
    kl_histogram,
    largest,
    mean_drift,
    mean_over_rows,
    paired_difference,
    quantiles,
    slices_by_origin,
    slices_by_position,
    sure_flips,
    token_metrics,
)
from recompile.errors import NotFiniteError


def logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_kl_of_a_known_pair() -> None:
    p = torch.tensor([[[0.50, 0.25, 0.25]]])
    q = torch.tensor([[[0.25, 0.25, 0.50]]])
    # 0.5 ln(0.5 / 0.25) + 0 + 0.25 ln(0.25 / 0.5) = 0.5 ln 2 - 0.25 ln 2
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(0.25 * math.log(2), abs=1e-7)


def test_kl_measures_from_the_reference() -> None:
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p, q).item() == pytest.approx(forward, rel=1e-6)  # float32
    assert kl_divergence(q, p).item() == pytest.approx(backward, rel=1e-6)


def test_kl_of_equal_logits_is_exactly_zero() -> None:
    z = logits(3, 5, 300, spread=20)
    assert torch.equal(kl_divergence(z, z.clone()), torch.zeros(3, 5))


def test_kl_does_not_see_what_is_added_to_all_logits() -> None:
    z = logits(4, 100)
    assert float(kl_divergence(z, z + 7.5).abs().max()) < 1e-6  # float32 rounding of logits up to 20


def test_a_token_without_probability_adds_nothing() -> None:
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([0.25, 0.25, 0.5]).log()
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2), abs=1e-7)
    assert kl_divergence(p, p).item() == 0.0
    assert kl_divergence(q, p).item() == math.inf, "what q can say and p cannot costs without bound"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["reference", "candidate", "both"])
def test_kl_of_a_logit_that_is_no_number_is_none(bad: float, where: str) -> None:
    reference, candidate = logits(3, 50, seed=1), logits(3, 50, seed=2)
    if where != "candidate":
        reference[1, 7] = bad
    if where != "reference":
        candidate[1, 7] = bad
    kl = kl_divergence(reference, candidate)
    assert kl.isfinite().tolist() == [True, False, True]
    assert not token_metrics(reference, candidate, torch.tensor([0, 1, 2]), 3).is_finite


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 400), spread=st.floats(0.01, 8))
def test_kl_is_that_of_float64(seed: int, vocab: int, spread: float) -> None:
    a, b = logits(3, vocab, seed=seed, spread=spread), logits(3, vocab, seed=seed + 1, spread=spread)
    log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    # float32 log-probabilities of size up to ~60 carry 4e-6 each, and the terms are weighted by p <= 1
    torch.testing.assert_close(kl_divergence(a, b).double(), wanted, rtol=1e-5, atol=1e-5)
    assert float(wanted.min()) >= 0


# ---- all figures of a token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 1000, 300_000])  # the last is more than one block of tokens
def test_token_metrics_are_those_of_a_plain_implementation(vocab: int) -> None:
    tokens, top = 6, 4
    a, b = logits(tokens, vocab, seed=1), logits(tokens, vocab, seed=1) + 0.3 * logits(tokens, vocab, seed=2)
    labels = torch.tensor([0, 3, 5, -1, 2, -1])
    found = token_metrics(a, b, labels, top)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    # torch sums exp over 300 000 float32 logits to about 1e-5; smaller vocabularies are better by far
    close = partial(pytest.approx, rel=3e-5, abs=3e-6)
    for t in range(tokens):
        kl = float((p[t] * (p[t].log() - q[t].log())).sum())
        back = float((q[t] * (q[t].log() - p[t].log())).sum())
        assert float(found.kl[t]) == close(kl)
        assert float(found.kl_reverse[t]) == close(back)
        assert float(found.confidence[t]) == close(float(p[t].max()))
        order_a, order_b = p[t].argsort(descending=True).tolist(), q[t].argsort(descending=True).tolist()
        label = int(labels[t])
        for k in range(1, top + 1):
            assert bool(found.reference_hit[t, k - 1]) is (label in order_a[:k])
            assert bool(found.candidate_hit[t, k - 1]) is (label in order_b[:k])
            assert bool(found.agree[t, k - 1]) is (order_a[:k] == order_b[:k])
        if label < 0:
            assert (float(found.reference_nll[t]), float(found.candidate_nll[t])) == (0.0, 0.0)
        else:
            assert float(found.reference_nll[t]) == close(-math.log(p[t, label]))
            assert float(found.candidate_nll[t]) == close(-math.log(q[t, label]))
    assert found.labelled.tolist() == (labels >= 0).tolist()
    assert found.is_finite
    assert not bool(found.same_logit_bits.any())


def test_token_metrics_of_equal_logits() -> None:
    z = logits(5, 64)
    found = token_metrics(z, z.clone(), torch.tensor([1, 2, 3, 4, -1]), 3)
    assert torch.equal(found.kl, torch.zeros(5))
    assert torch.equal(found.kl_reverse, torch.zeros(5))
    assert bool(found.agree.all())
    assert bool(found.same_logit_bits.all())
    one_off = z.clone()
    one_off[2, 10] = torch.nextafter(one_off[2, 10], torch.tensor(math.inf))
    changed = token_metrics(z, one_off, torch.tensor([1, 2, 3, 4, -1]), 3)
    assert changed.same_logit_bits.tolist() == [True, True, False, True, True]


def test_top_k_is_cut_to_the_vocabulary() -> None:
    found = token_metrics(logits(2, 3), logits(2, 3, seed=5), torch.tensor([0, 1]), 10)
    assert found.agree.shape == (2, 3)
    assert bool(found.reference_hit[:, -1].all())


def test_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        token_metrics(logits(2, 5), logits(2, 6), torch.tensor([0, 1]), 1)
    with pytest.raises(ValueError, match="do not fit"):
        token_metrics(logits(2, 5), logits(2, 5), torch.tensor([0]), 1)


# ---- means and their errors ------------------------------------------------------------------------------------------


def test_standard_error_of_equal_rows_is_that_of_the_row_means() -> None:
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 7.0]])  # row means 2, 2, 6
    found = mean_over_rows(values)
    assert found.mean == pytest.approx(10 / 3)
    # variance of (2, 2, 6) about 10/3: (16/9 + 16/9 + 64/9) / 2 = 16/3; error sqrt(16/3 / 3) = 4/3
    assert found.std_error == pytest.approx(4 / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(bad: float) -> None:
    values = torch.tensor([[1.0, bad], [2.0, 3.0]])
    for figure in (mean_over_rows, quantiles, kl_histogram):
        with pytest.raises(NotFiniteError, match="1 of 4 values are NaN or infinite"):
            figure(values)
    for kl, confidence in ((values, torch.full((2, 2), 0.5)), (torch.ones(2, 2), values)):
        with pytest.raises(NotFiniteError, match="1 of 4"):
            kl_by_confidence(kl, confidence)
    assert mean_over_rows(values, torch.tensor([[True, False], [True, True]])).mean == 2.0, "only what is counted"


def test_only_tokens_that_count_are_in_a_mean() -> None:
    values = torch.tensor([[1.0, 9.0], [9.0, 3.0], [9.0, 9.0]])
    found = mean_over_rows(values, torch.tensor([[True, False], [False, True], [False, False]]))
    assert found.mean == 2.0  # of 1 and 3; the third row has nothing to say
    assert found.std_error == pytest.approx(1.0)  # rows 1 and 2, deviations 1 each: sqrt(2 / 1 / 2)


def test_rows_weigh_by_their_tokens() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0], [4.0, 9.0, 9.0]])
    assert mean_over_rows(values, torch.tensor([[True] * 3, [True, False, False]])).mean == 1.0


def test_a_mean_without_rows_or_with_one() -> None:
    assert mean_over_rows(torch.tensor([[2.0, 4.0]])) == Mean(3.0, None)
    with pytest.raises(NotFiniteError, match="over no tokens"):
        mean_over_rows(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


def test_standard_error_is_the_spread_of_repeated_means() -> None:
    """What it promises: means of fresh rows scatter by it."""
    generator = torch.Generator().manual_seed(3)
    means, errors = [], []
    for _ in range(300):
        row_level = torch.randn(12, 1, generator=generator)  # rows differ, tokens of a row go together
        found = mean_over_rows(row_level + 0.1 * torch.randn(12, 20, generator=generator))
        means.append(found.mean)
        errors.append(found.std_error)
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)  # 300 draws know a spread to about 4 %


def test_paired_difference_by_hand() -> None:
    left, right = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 2.0, 2.0, 4.0])
    mean, (low, high) = paired_difference(left, right)  # differences 1, 0, 1, 2
    assert mean.mean == 1.0
    error = math.sqrt(2 / 3) / 2
    assert mean.std_error == pytest.approx(error)
    assert (low, high) == pytest.approx((1 - 3.182446 * error, 1 + 3.182446 * error), rel=1e-6)  # t, 3 degrees, 97.5 %


def test_paired_difference_of_one_row_knows_nothing() -> None:
    mean, interval = paired_difference(torch.tensor([1.0]), torch.tensor([0.5]))
    assert mean == Mean(0.5, None)
    assert interval == (-math.inf, math.inf)


def test_pairing_sees_what_row_noise_hides() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 5 * torch.rand(20, generator=generator)
    mean, (low, high) = paired_difference(noise + 0.1, noise)
    assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-6)
    assert mean.mean == pytest.approx(0.1, abs=1e-6)


def test_quantiles_by_hand() -> None:
    found = quantiles(torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0]))
    assert (found.median, found.p90, found.p99) == (2.0, pytest.approx(3.6), pytest.approx(3.96))
    assert (found.p999, found.max) == (pytest.approx(3.996), 4.0)
    assert quantiles(torch.tensor([5.0])).p90 == 5.0


def test_bins_of_confidence() -> None:
    assert CONFIDENCE_EDGES == (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
    confidence = torch.tensor([0.1, 0.25, 0.3, 0.74, 0.75, 0.95, 1.0])
    kl = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    bins = kl_by_confidence(kl, confidence)
    assert [(b.low, b.high) for b in bins] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.95), (0.95, 1.0)]
    assert [b.tokens for b in bins] == [1, 2, 1, 1, 2]
    assert [b.kl_mean for b in bins] == [1.0, 3.0, 8.0, 16.0, 48.0]
    assert [b.share for b in bins] == pytest.approx([1 / 7, 2 / 7, 1 / 7, 1 / 7, 2 / 7])  # of 7 counted tokens
    assert sum(b.share for b in bins) == pytest.approx(1)
    empty = kl_by_confidence(torch.tensor([1.0]), torch.tensor([0.9]))[0]
    assert empty.tokens == 0
    assert math.isnan(empty.kl_mean)


# ---- drift of states -------------------------------------------------------------------------------------------------


def test_drift_by_hand() -> None:
    reference = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])  # norms 5, 1
    candidate = torch.tensor([[[3.0, 3.0]], [[0.0, 1.0]]])
    ratio, largest, sqnr, cosine = drift(candidate, reference)
    assert ratio.tolist() == pytest.approx([0.2, math.sqrt(2)])
    assert largest.tolist() == pytest.approx([0.2, 1.0])
    assert sqnr.tolist() == pytest.approx([20 * math.log10(5), -10 * math.log10(2)])
    assert cosine.tolist() == pytest.approx([1 - 21 / (5 * math.sqrt(18)), 1.0], abs=1e-6)  # 1 - a float32
    whole = mean_drift([drift(candidate[:1], reference[:1]), drift(candidate[1:], reference[1:])])
    assert whole.relative_error == pytest.approx((0.2 + math.sqrt(2)) / 2)
    assert whole.max_difference == pytest.approx(1.0)


def test_drift_of_equal_states_is_exactly_none() -> None:
    state = logits(3, 4, 50)
    found = mean_drift([drift(state, state.clone())])
    assert (found.relative_error, found.max_difference, found.cosine_error) == (0.0, 0.0, 0.0)
    assert found.sqnr_db == math.inf


# ---- the text's tokens, sure tokens, slices --------------------------------------------------------------------------


def test_delta_p_by_hand() -> None:
    before = -torch.tensor([[0.5, 0.2], [0.8, 0.4]]).log()
    after = -torch.tensor([[0.4, 0.9], [0.8, 0.1]]).log()
    labelled = torch.tensor([[True, False], [True, True]])  # changes -0.1, 0, -0.3; the 0.7 has no label
    found = delta_p(before, after, labelled)
    assert found.mean.mean == pytest.approx(-0.4 / 3)
    assert found.rms.mean == pytest.approx(math.sqrt((0.01 + 0.09) / 3))
    assert found.rms.std_error == pytest.approx(
        mean_over_rows(torch.tensor([[0.01, 0.0], [0.0, 0.09]]), labelled).std_error / (2 * found.rms.mean)
    )
    assert delta_p(before, before, labelled).rms == Mean(0.0, 0.0)


def test_sure_flips_count_only_tokens_the_reference_was_sure_of() -> None:
    confidence = torch.tensor([[0.95, 0.5, 0.99], [0.91, 0.2, 0.9]])
    same = torch.tensor([[True, False, False], [False, False, False]])
    found = sure_flips(confidence, same)
    assert (found.tokens, found.share.mean) == (3, pytest.approx(2 / 3))
    assert sure_flips(confidence, same, above=0.995).share is None


def test_slices_are_the_figures_of_their_tokens_alone() -> None:
    kl, same = torch.rand(5, 1300, dtype=torch.float64), torch.rand(5, 1300) > 0.4
    code, prose = slices_by_origin(kl, same, ["code", "prose", "code", "prose", "prose"])
    assert (code.name, code.rows, code.tokens) == ("code", 2, 2600)
    assert code.kl == mean_over_rows(kl[[0, 2]])
    assert prose.same_top == mean_over_rows(same[[1, 3, 4]].float())
    near, far = slices_by_position(kl, same)
    assert (near.name, far.name) == ("0 - 512", "512 - 1300")
    assert far.kl == mean_over_rows(kl[:, 512:])
    assert slices_by_origin(kl, same, ["code"] * 5) == () == slices_by_position(kl[:, :512], same[:, :512])


@pytest.mark.parametrize(("vocab", "k"), [(3, 3), (64, 1), (130, 2), (1000, 5), (49_152, 5), (64 * 5, 5)])
def test_the_largest_are_those_of_topk(vocab: int, k: int) -> None:
    values = logits(7, vocab, seed=vocab)
    values[1, -k:] = values[1].max() + torch.arange(1.0, k + 1)  # at the end, beyond the last whole chunk
    values[2, : 2 * k : 2] = -math.inf
    found, places = largest(values, k)
    wanted = values.topk(k, -1)
    assert torch.equal(found, wanted.values)
    assert torch.equal(places, wanted.indices)
