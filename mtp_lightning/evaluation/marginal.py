"""What a next-token model says of tokens further on: sums over the likely tokens in between [Mehra 2025, section 2.1].

p(x_{t+k}) = sum over s of p(s) p(x_{t+k} | s), where s runs over k-1 tokens: over all of them, or over the smallest set
that holds most of the probability. It is the baseline that extra heads are judged against: exact, and slow.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.console.progress import counted
from mtp_lightning.data.loading.factory import open_rows, prepare_data
from mtp_lightning.decode.state import DecodeState, prefill, verify, verify_tree
from mtp_lightning.decode.transformers_windows import is_recurrent, knows_slots
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe

BRANCH_TOKENS = 256  # of branches that go through the model together, beside the text's own cache
LEAST_PREFIX_TOKENS = 8


class Law(NamedTuple):
    """The distribution of one token ahead."""

    probabilities: Tensor  # (V,), sums to 1
    mass: float  # probability of the paths that were summed over, of all there are
    num_paths: int


@dataclass(frozen=True)
class OffsetAccuracy:
    """How often the true token is among the likeliest ones; None where the model has no head of this offset."""

    offset: int
    marginal_top1: float
    marginal_top: float
    head_top1: float | None
    head_top: float | None
    mean_paths: float
    mean_mass: float


@dataclass(frozen=True)
class MarginalReport:
    """Marginalization and heads on the same positions."""

    recipe: str
    num_samples: int
    num_positions: int
    texts_sha256: str
    top: int
    nucleus: float
    most_paths: int
    offsets: tuple[OffsetAccuracy, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values to be written to a file."""
        return asdict(self)


@torch.no_grad()
def laws_ahead(session: DecodeState, num_offsets: int, *, nucleus: float, most_paths: int) -> list[Law]:
    """Return the laws of the next tokens of a session of one row, the main head's own first.

    Args:
        session: its row's last committed token has not been fed yet; that and the cache stay as they are.
        num_offsets: how many tokens ahead.
        nucleus: share of the probability that the summed paths hold at least, unless `most_paths` cuts them.
        most_paths: largest number of paths that are summed over; what is left out is seen in `Law.mass`.
    """
    first = verify(session, session.tokens.new_zeros(1, 0))[0, 0].double().softmax(-1)  # (V,)
    laws, paths, weights = [Law(first, 1.0, 1)], first.new_zeros(1, 0, dtype=torch.long), first.new_ones(1)
    following = first[None]  # (S, V) law of the token after each path
    for _ in range(1, num_offsets):
        joint = (weights[:, None] * following).flatten()  # (S V,)
        chosen = _nucleus(joint, nucleus, most_paths)
        heads, tails = chosen // len(first), chosen % len(first)
        paths = torch.cat((paths[heads], tails[:, None]), dim=1)  # (S', k-1)
        weights = joint[chosen]
        following = _laws_after(session, paths)
        mass = weights.sum()
        laws.append(Law((weights / mass) @ following, float(mass), len(paths)))
    return laws


def _nucleus(probabilities: Tensor, share: float, most: int) -> Tensor:
    """Choose the likeliest entries that hold a share of the whole, or as many as may be."""
    ordered, index = probabilities.sort(descending=True, stable=True)
    behind = ordered.cumsum(0) - ordered
    return index[(behind < share)][:most]


def _laws_after(session: DecodeState, paths: Tensor) -> Tensor:
    """Laws of the token after each path of (S, J) tokens that follows the committed one: (S, V) float64."""
    length = paths.shape[1]
    laws = []
    for part in torch.split(paths, max(1, BRANCH_TOKENS // length)):
        num_nodes = 1 + part.numel()
        branch = torch.arange(len(part), device=paths.device).repeat_interleave(length)
        depth = torch.arange(1, length + 1, device=paths.device).repeat(len(part))
        ancestry = torch.eye(num_nodes, dtype=torch.bool, device=paths.device)
        ancestry[1:, 1:] = (branch[:, None] == branch) & (depth[:, None] >= depth)
        ancestry[:, 0] = True
        committed = session.tokens.gather(1, session.lengths[:, None])
        nodes = torch.cat((committed, part.reshape(1, -1)), dim=1)
        depths = torch.nn.functional.pad(depth, (1, 0))
        scores, _ = verify_tree(session, nodes, depths, ancestry)  # (1, 1 + C J, V)
        laws.append(scores[0, length::length].double().softmax(-1))
    return torch.cat(laws)


@torch.no_grad()
def measure_marginal(
    path: Path,
    *,
    num_offsets: int = 2,
    num_samples: int = 50,
    last_tokens: int = 20,
    top: int = 5,
    nucleus: float = 0.99,
    most_paths: int = 1024,
    device: str = "cpu",
) -> MarginalReport:
    """Compare marginalization with the heads at the last tokens of held-out texts.

    Raises:
        CheckpointError: There is nothing to load.
        DataError: No held-out text is long enough.
        DecodingError: The arguments make no sense.
    """
    check_settings(num_offsets, last_tokens, top, nucleus, most_paths)
    recipe, model = load_model(path, device=device)
    if is_recurrent(model) or knows_slots(model):
        raise DecodingError(
            "layers must keep keys and values that know no distance by slots, for branches to be summed over",
            f"{recipe.name}, whose layers {'carry a state' if is_recurrent(model) else 'attend by distance (ALiBi)'}",
            "Measure its heads with `mtp eval acceptance`",
        )
    texts = held_out_texts(recipe, num_samples, LEAST_PREFIX_TOKENS + last_tokens)
    hits = np.zeros((num_offsets, 4))  # marginal top-1 and top-K, head top-1 and top-K
    sums = np.zeros((num_offsets, 2))  # paths, mass
    counts = np.zeros(num_offsets, dtype=np.int64)
    with counted("Summing", total=len(texts) * last_tokens, unit="positions") as advance:
        for text in texts:
            scores = _head_scores(model, text)
            begin = len(text) - last_tokens - 1
            session = _begun(model, text, begin, remaining=last_tokens + BRANCH_TOKENS + num_offsets)
            for place in range(begin, len(text) - 1):
                laws = laws_ahead(session, num_offsets, nucleus=nucleus, most_paths=most_paths)
                for k, law in enumerate(laws[: len(text) - 1 - place]):
                    target = text[place + k + 1]
                    hits[k, :2] += _hits(law.probabilities, target, top)
                    if k < model.num_offsets:
                        hits[k, 2:] += _hits(scores[k, place], target, top)
                    sums[k] += law.num_paths, law.mass
                    counts[k] += 1
                _step(session, text[place + 1])
                advance(1)
    offsets = tuple(
        _accuracy(k + 1, hits[k] / counts[k], sums[k] / counts[k], has_head=k < model.num_offsets)
        for k in range(num_offsets)
    )
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return MarginalReport(recipe.name, len(texts), int(counts[0]), digest, top, nucleus, most_paths, offsets)


def check_settings(num_offsets: int, last_tokens: int, top: int, nucleus: float, most_paths: int) -> None:
    """Refuse settings of `measure_marginal` that make no sense.

    Raises:
        DecodingError: Names the first.
    """
    checks = (
        ("--offsets must be 2 or more, and fewer than --last", num_offsets, 2 <= num_offsets < last_tokens),
        ("--top must be 1 or more", top, top >= 1),
        ("--nucleus must lie above 0, and at most at 1", nucleus, 0 < nucleus <= 1),
        ("--paths must be 1 or more", most_paths, most_paths >= 1),
    )
    for expected, found, holds in checks:
        if not holds:
            raise DecodingError(expected, str(found), "Change it")


def held_out_texts(recipe: Recipe, num_texts: int, least_tokens: int) -> list[list[int]]:
    """Take from held-out rows, spread evenly, the longest stretch of one document in each.

    Raises:
        DataError: None is long enough.
    """
    prepare_data(recipe)
    rows = open_rows(recipe, "validation")
    arrays = rows.read(rows.spread(min(4 * num_texts, len(rows))))
    texts = []
    for tokens, documents in zip(arrays["tokens"].tolist(), arrays["documents"], strict=True):
        lengths = np.bincount(documents[: recipe.data.seq_len])
        begin = int(lengths[: lengths.argmax()].sum())
        texts.append(tokens[begin : begin + int(lengths.max())])
    long = [text for text in texts if len(text) >= least_tokens][:num_texts]
    if not long:
        raise DataError(
            f"held-out rows must hold {least_tokens} tokens of one document",
            f"{max(map(len, texts), default=0)} at most in {len(texts)} rows",
            "Lower --last, or train with a larger data.seq_len",
        )
    return long


def _begun(model: MtpModel, text: list[int], begin: int, *, remaining: int) -> DecodeState:
    """A session that has read the text before a place and has committed the token there."""
    session = DecodeState(model, [text[:begin]], max_drafts=0, remaining=remaining, seed=0)
    prefill(session)
    session.tokens[0, begin] = text[begin]
    session.note_progress()
    return session


def _step(session: DecodeState, token: int) -> None:
    """Feed the committed token, which `verify` has done, and commit the next."""
    session.cache.lengths += 1
    session.tokens[0, int(session.lengths[0])] = token
    session.note_progress()


def _head_scores(model: MtpModel, text: list[int]) -> Tensor:
    """Scores of every offset at every place of a text, from one forward: (N, T, V)."""
    device = model.trunk.embed_tokens.weight.device
    tokens = torch.tensor([text + [0] * model.num_offsets], device=device)
    states = model.hidden_states(tokens, torch.zeros_like(tokens))
    return torch.stack([model.unembedding.logits(offset, state)[0] for offset, state in states.items()])


def _hits(scores: Tensor, target: int, top: int) -> tuple[bool, bool]:
    """Tell whether a token is the likeliest, and whether it is among the likeliest."""
    likeliest = scores.topk(min(top, len(scores))).indices.tolist()
    return likeliest[0] == target, target in likeliest


def _accuracy(offset: int, shares: Any, means: Any, *, has_head: bool) -> OffsetAccuracy:
    marginal_top1, marginal_top, head_top1, head_top = map(float, shares)
    mean_paths, mean_mass = map(float, means)
    return OffsetAccuracy(
        offset=offset,
        marginal_top1=marginal_top1,
        marginal_top=marginal_top,
        head_top1=head_top1 if has_head else None,
        head_top=head_top if has_head else None,
        mean_paths=mean_paths,
        mean_mass=mean_mass,
    )
