"""Law 3: fast targets = slow oracle; no target crosses a document; each known field bug is caught at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.data.loading.peek import targets_of_row
from mtp_lightning.errors import TrainingError
from mtp_lightning.losses import target_checks
from mtp_lightning.losses.target_checks import MOST_MISSES, TargetCountCheck, check_targets
from mtp_lightning.losses.targets import IGNORE, count_targets, oracle_targets, shifted_targets


@st.composite
def rows(draw):
    num_offsets = draw(st.integers(1, 5))
    length = num_offsets + draw(st.integers(1, 12))
    num_rows = draw(st.integers(1, 4))
    shape = (num_rows, length)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(7, shape, generator=generator)
    documents = (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))).cumsum(1)
    mask = torch.rand(shape, generator=generator) < 0.6 if draw(st.booleans()) else None
    return num_offsets, tokens, documents, mask


@given(rows())
@settings(max_examples=200, deadline=None)
def test_fast_targets_are_the_oracles(drawn):
    num_offsets, tokens, documents, mask = drawn
    fast = shifted_targets(tokens, documents, num_offsets, mask)
    for row in range(len(tokens)):
        row_mask = None if mask is None else mask[row].tolist()
        assert fast[:, row].tolist() == oracle_targets(
            tokens[row].tolist(), documents[row].tolist(), num_offsets, row_mask
        )
    check_targets(tokens, documents, mask, fast)


@given(rows())
@settings(max_examples=50, deadline=None)
def test_no_target_crosses_a_document(drawn):
    num_offsets, tokens, documents, mask = drawn
    fast = shifted_targets(tokens, documents, num_offsets, mask)
    for offset, row, position in (fast != IGNORE).nonzero().tolist():
        assert documents[row, position] == documents[row, position + offset + 1]


def masked_rows():
    """Two documents per row; the first two tokens of each are the prompt."""
    tokens = torch.arange(40).view(2, 20)
    documents = (torch.arange(20) >= 11).long().expand(2, 20)
    mask = (torch.arange(20) % 11 >= 2).expand(2, 20)
    return tokens, documents, mask


def shifted_by_one_more(tokens, documents, num_offsets, mask):
    """Targets of offset k+1 under the name of k, for k > 1 (off by one per offset)."""
    right = shifted_targets(tokens, documents, num_offsets, mask)
    return torch.cat((right[:1], torch.roll(right[1:], -1, dims=2)))


FIELD_BUGS = {
    "prompt tokens as targets": lambda t, d, n, m: shifted_targets(t, d, n, None),
    "mask of the position, not of the target": lambda t, d, n, m: shifted_targets(t, d, n, m.roll(1, 1)),
    "off by one per offset": shifted_by_one_more,
    "leak across documents": lambda t, d, n, m: shifted_targets(t, torch.zeros_like(d), n, m),
    "boundary of offset 1 used for all": lambda t, d, n, m: torch.where(
        shifted_targets(t, d, n, m)[:1] == IGNORE, IGNORE, shifted_targets(t, torch.zeros_like(d), n, m)
    ),
}


@pytest.mark.parametrize("bug", FIELD_BUGS)
def test_wrong_targets_stop_the_run(bug):
    tokens, documents, mask = masked_rows()
    check_targets(tokens, documents, mask, shifted_targets(tokens, documents, 3, mask))
    wrong = FIELD_BUGS[bug](tokens, documents, 3, mask)
    with pytest.raises(TrainingError, match="target of offset k at position t must be token t\\+k") as caught:
        check_targets(tokens, documents, mask, wrong)
    assert "row 0, offset" in caught.value.found


def test_wrong_normalising_count_stops_the_run(monkeypatch):
    tokens, documents, mask = masked_rows()
    targets = shifted_targets(tokens, documents, 3, mask)
    monkeypatch.setattr(target_checks, "count_targets", lambda targets: torch.tensor([targets[0].numel()] * 3))
    with pytest.raises(TrainingError, match="divided by the number of its own valid targets"):
        check_targets(tokens, documents, mask, targets)


def test_offsets_that_never_have_a_target_stop_the_run():
    tokens, documents, _ = masked_rows()
    targets = shifted_targets(tokens, documents, 3, torch.zeros_like(tokens, dtype=torch.bool))
    watch = TargetCountCheck()
    for _ in range(MOST_MISSES - 1):
        assert watch.look(count_targets(targets).tolist(), [1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    with pytest.raises(TrainingError, match="a valid target now and then; found none at offset 1, 2, 3"):
        watch.look(count_targets(targets).tolist(), [1.0, 1.0, 1.0])
    short = shifted_targets(tokens[:, :5], torch.arange(5).expand(2, 5) // 2, 3)
    assert count_targets(short).tolist() == [2, 0, 0]
    watch = TargetCountCheck()
    for _ in range(MOST_MISSES - 1):
        assert watch.look([2, 0, 0], [1.0, 1.0, 0.0]) == [1.0, 0.0, 0.0]
    with pytest.raises(TrainingError, match=r"none at offset 2 in"):
        watch.look([2, 0, 0], [1.0, 1.0, 0.0])
    assert watch.look([0, 1, 0], [1.0, 1.0, 0.0]) == [0.0, 1.0, 0.0]  # has had some: no fault


@given(rows())
@settings(max_examples=50, deadline=None)
def test_the_row_that_peek_shows_is_the_oracles(drawn):
    num_offsets, tokens, documents, mask = drawn
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    for row in range(len(tokens)):
        parts = tokens[row].tolist(), documents[row].tolist(), mask[row].tolist()
        shown = targets_of_row(*parts, num_offsets=num_offsets)
        defined = oracle_targets(*parts[:2], num_offsets, parts[2])
        assert [[IGNORE if target is None else target for target in own] for own in shown] == list(
            map(list, zip(*defined, strict=True))
        )
