"""The slow ways of decoding: no cache, whole forward passes, one token at a time; and drafts that are written down."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from mtp_lightning.decode import Settings, applicable_decoders, build_tree
from mtp_lightning.decode.state import DecodeState, prefill
from mtp_lightning.losses.targets import shifted_targets
from mtp_lightning.model.mtp_model import MtpModel
from tests.support.tiny import HEAD_KINDS, NEOX, tiny_model, tiny_recipe

PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [0, 1], [12, 12, 3, 3, 1])
LENGTH = 30
TRAINED_STEPS = 25
DECODED_KINDS = (*HEAD_KINDS, "parallel_neox", "sequential_neox", "parallel_mixed", "linear_mixed", "causal_mixed")
ACCURACIES = [[0.5, 0.3, 0.1], [0.4, 0.2], [0.3, 0.2]]
TREE = build_tree(ACCURACIES, 9)


@functools.cache
def model_of(kind: str, *, num_offsets: int = 4, attention: str = "window") -> MtpModel:
    """A tiny random model in float64, of the GPT-NeoX type or with mixtures and updates where the kind says so."""
    heads = HEAD_KINDS[kind.removesuffix("_neox").removesuffix("_mixed")] | {"num_offsets": num_offsets}
    section = NEOX if kind.endswith("_neox") else {}
    adapt = {"layer_mix": {}, "lora": {}} if kind.endswith("_mixed") else {}
    recipe = tiny_recipe(heads=heads, data={"document_mask": attention == "document"}, model=section, adapt=adapt)
    return tiny_model(recipe).requires_grad_(requires_grad=False)


@functools.cache
def trained_model_of(kind: str) -> MtpModel:
    """A model that has begun to learn a text of repeated words, so that its heads are often right, and often not."""
    model = tiny_model(tiny_recipe(heads=HEAD_KINDS[kind], data={"seq_len": 40}))
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(13, (4, 5), generator=generator)
    rows = words[torch.randint(4, (8, 9), generator=generator)].flatten(1)[:, :44]  # (8, T+n)
    targets = shifted_targets(rows, torch.zeros_like(rows), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(TRAINED_STEPS):
        states = model.hidden_states(rows, torch.zeros_like(rows))
        logits = {offset: model.unembedding.logits(offset, state) for offset, state in states.items()}
        losses = [
            functional.cross_entropy(scores.flatten(0, 1), targets[k - 1].flatten()) for k, scores in logits.items()
        ]
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
    return model.requires_grad_(requires_grad=False)


def full_logits(model: MtpModel, tokens: list[int], offsets: list[int] | None = None) -> dict[int, Tensor]:
    """Scores of every offset (or of some) at every position from one uncached forward over a text: (T, V) each."""
    padded = torch.tensor([tokens + [0] * model.num_offsets])
    states = model.hidden_states(padded, torch.zeros_like(padded), offsets)
    return {offset: model.unembedding.logits(offset, state)[0] for offset, state in states.items()}


@functools.cache
def plain_text(model: MtpModel, prompt: tuple[int, ...], length: int = LENGTH) -> list[int]:
    """New tokens by the main head's first choice, a whole forward for each."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(full_logits(model, tokens, model.heads.chain(1))[1][-1].argmax()))
    return tokens[len(prompt) :]


def plain_texts(model: MtpModel, prompts) -> list[list[int]]:
    """Plain text of every prompt."""
    return [plain_text(model, tuple(prompt)) for prompt in prompts]


def settings_of(model: MtpModel, **options) -> list[Settings]:
    """Settings for every decoder that fits the model, plain greedy first."""
    return [
        Settings(decoder=decoder, tree=TREE if decoder == "tree" else None, **options)
        for decoder in applicable_decoders(model)
    ]


class WrittenDrafts:
    """Drafts of which a known number is right: `pattern[row][length % len]`; the one after those is wrong."""

    def __init__(self, model: MtpModel, prompts, pattern: list[list[int]]) -> None:
        self.texts = [[*prompt, *text] for prompt, text in zip(prompts, plain_texts(model, prompts), strict=True)]
        self.pattern = pattern
        self.vocab_size = model.section.vocab_size

    def num_right(self, row: int, length: int, num_drafts: int) -> int:
        """How many drafts of a row are right at a length."""
        wanted = self.pattern[row][length % len(self.pattern[row])]
        return min(wanted, num_drafts)

    def __call__(self, lengths: Tensor, num_drafts: int) -> Tensor:
        """Write the drafts: (B,) -> (B, K)."""
        drafts = []
        for row, length in enumerate(lengths.tolist()):
            text = self.texts[row][length + 1 : length + 1 + num_drafts]
            text += [0] * (num_drafts - len(text))  # behind the end of a finished text
            right = self.num_right(row, length, num_drafts)
            drafts.append([(token + (j == right)) % self.vocab_size for j, token in enumerate(text)])
        return torch.tensor(drafts)


def begun_session(model: MtpModel, prompts) -> DecodeState:
    """A session whose prompts have been read, each with its first new token committed."""
    session = DecodeState(model, prompts, max_drafts=model.num_offsets - 1, remaining=4 * LENGTH, seed=0)
    session.tokens.scatter_(1, session.prompt_lengths[:, None], prefill(session).argmax(-1)[:, None])
    session.note_progress()
    return session
