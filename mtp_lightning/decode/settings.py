"""What a user decides about generation, and what can be refused before the model runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

from mtp_lightning.decode.sampling import Sampling
from mtp_lightning.decode.transformers_windows import is_recurrent, knows_slots, rotary_switch
from mtp_lightning.decode.tree import Tree, check_tree
from mtp_lightning.errors import DecodingError
from mtp_lightning.model.heads import TRUNK, Heads
from mtp_lightning.model.mtp_model import MtpModel

Decoder = Literal["auto", "greedy", "blockwise", "chain", "tree"]
DECODERS: tuple[Decoder, ...] = ("auto", "greedy", "blockwise", "chain", "tree")
ADAPTIVE: Literal["adaptive"] = "adaptive"
SEEDS = (-(2**63), 2**64)  # what torch takes: from, and below


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to generate."""

    max_new_tokens: int = 128
    decoder: Decoder = "auto"  # greedy: one token per forward (sampled, with a temperature); auto: by head kind
    draft_length: int | Literal["adaptive"] | None = None  # drafts per step; None for all n - 1
    tree: Tree | None = None  # for decoder tree
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    sample_drafts: bool = False  # with a temperature: draw drafts from the heads, rather than take the likeliest
    typical: bool = False  # LOSSY: keep drafts that are likely enough; the text loses the model's law
    typical_epsilon: float = 0.09  # likely enough whatever the entropy [Medusa's generation defaults]
    typical_delta: float = 0.3  # share of exp(-entropy) that is likely enough
    compile: bool = False  # steps of fixed shapes, compiled; on a GPU, replayed as a CUDA graph (`static.py`)
    seed: int = 0
    stop_tokens: Sequence[int] = ()  # end a text, and are its last token
    stop_strings: Sequence[bytes] = ()  # end a text with the token that completes one
    detokenize: Callable[[Sequence[int]], bytes] | None = None  # what tokens stand for; needed for stop strings

    @cached_property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def applicable_decoders(model: MtpModel) -> list[Decoder]:
    """List the decoders that fit the model's heads, the one that `auto` takes first among those that draft.

    Heads that read no tokens draft all at once (blockwise) and below every branch of a tree alike; modules that read
    tokens draft one after the other (chain), which heads that read each other's states may do, too. Drafts need a past
    that can be rolled back.
    """
    heads = model.heads
    if heads.num_offsets == 1 or is_recurrent(model):
        return ["greedy"]
    if heads.reads_tokens:
        return ["greedy", "chain"]
    chain: list[Decoder] = ["chain"] if _is_chained(heads) else []
    tree: list[Decoder] = [] if knows_slots(model) else ["tree"]
    return ["greedy", "blockwise", *chain, *tree]


def _is_chained(heads: Heads) -> bool:
    return any(heads.parent_of(offset) != TRUNK for offset in heads.offsets)


def resolve_decoder(model: MtpModel, decoder: Decoder) -> Decoder:
    """Choose the decoder, or check the one that was chosen.

    Raises:
        DecodingError: There is no such decoder, or it does not fit the heads.
    """
    applicable = applicable_decoders(model)
    if decoder == "auto":
        return applicable[1] if len(applicable) > 1 else "greedy"
    if decoder not in DECODERS:
        raise DecodingError("a decoder must be one that there is", repr(decoder), f"Choose: {', '.join(DECODERS)}")
    if decoder not in applicable:
        n = model.num_offsets
        why = "one offset, which drafts nothing" if n == 1 else f"{type(model.heads).__name__} with n = {n}"
        if is_recurrent(model):
            why = "layers that carry a state of all the past, which rejected drafts cannot be taken back from"
        elif decoder == "tree" and knows_slots(model):
            why = "attention by distance (ALiBi), which counts the nodes of a tree one after the other"
        raise DecodingError(
            f"decoder {decoder} must fit the model's heads", why, f"Choose: auto, {', '.join(applicable)}"
        )
    return decoder


def resolve_draft_length(model: MtpModel, decoder: Decoder, settings: Settings) -> int:
    """Say how many tokens a step drafts at most.

    Raises:
        DecodingError: The heads cannot draft as many.
    """
    most, wanted = model.num_offsets - 1, settings.draft_length
    if decoder == "greedy":
        if wanted is None:
            return 0
        raise DecodingError(
            "draft_length needs a decoder that drafts",
            f"draft_length {wanted}, with decoder greedy" + (" for a model with one offset" if most == 0 else ""),
            "Leave draft_length away" + (", or choose another decoder" if most else ""),
        )
    if wanted is None or wanted == ADAPTIVE:
        return most
    if not isinstance(wanted, int) or not 1 <= wanted <= most:
        raise DecodingError(
            f"draft_length must lie in 1 to n - 1 = {most}",
            repr(wanted),
            f"Give at most {most}, {ADAPTIVE!r}, or leave it away to draft with every head",
        )
    return wanted


def check_settings(model: MtpModel, decoder: Decoder, settings: Settings) -> None:
    """Refuse what does not go together.

    Raises:
        DecodingError: It does not.
    """
    greedy = settings.sampling.is_greedy
    both, warm = "Change one of the two", "Give a temperature above 0, or leave it away"
    checks = (
        ("max_new_tokens must be at least 1", settings.max_new_tokens, settings.max_new_tokens >= 1, "Ask for more"),
        (
            "a seed must be a whole number of 64 bits",
            settings.seed,
            SEEDS[0] <= settings.seed < SEEDS[1],
            "Give one of fewer digits",
        ),
        (
            "typical acceptance needs a temperature above 0",
            settings.temperature,
            not (settings.typical and greedy),
            warm,
        ),
        (
            "drawing drafts needs a temperature above 0",
            settings.temperature,
            not (settings.sample_drafts and greedy),
            warm,
        ),
        (
            "drawn drafts must be verified losslessly, in a chain",
            f"decoder {decoder}, typical {settings.typical}",
            not settings.sample_drafts or (decoder != "tree" and not settings.typical),
            both,
        ),
        (
            "typical acceptance needs drafts in a chain",
            "decoder tree",
            not (settings.typical and decoder == "tree"),
            both,
        ),
        (
            "stop strings need `detokenize`, which says what tokens stand for",
            "none",
            not settings.stop_strings or settings.detokenize is not None,
            "Give both, or none of them",
        ),
        (
            "a stop string must hold a character",
            "an empty one",
            all(settings.stop_strings),
            "Give the text to end at, or leave it away to go on to the end of the text",
        ),
        (
            "compiled steps must all have as many drafts",
            f"draft_length {ADAPTIVE}",
            not settings.compile or settings.draft_length != ADAPTIVE,
            "Give draft_length a number, or leave it away to draft with every head",
        ),
        (
            "decoder tree needs a tree, and no draft_length",
            f"{'no' if settings.tree is None else 'a'} tree, draft_length {settings.draft_length}",
            decoder != "tree" or (settings.tree is not None and settings.draft_length is None),
            "Give a tree, from `mtp bench tree`, and leave draft_length away",
        ),
    )
    for expected, found, is_kept, hint in checks:
        if not is_kept:
            raise DecodingError(expected, str(found), hint)
    if decoder == "tree" and settings.tree is not None:
        check_tree(settings.tree, model.num_offsets, model.unembedding.num_drafted)


def _check_crossing(model: MtpModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse texts whose keys would be turned by two sets of angles."""
    switch = rotary_switch(model)
    longest, drafts = max(map(len, prompts)) + max_new_tokens, model.num_offsets
    if switch is not None and min(map(len, prompts)) <= switch < longest + drafts:
        raise DecodingError(
            f"texts of one batch must all end {drafts} tokens before, or all begin behind, the length where rotary "
            f"angles change (longrope), {switch:,}",
            f"prompts from {min(map(len, prompts)):,} tokens, and texts up to {longest:,}",
            "Ask for fewer new tokens, or give long and short prompts apart",
        )


def check_prompts(model: MtpModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot go on from.

    Raises:
        DecodingError: There are none, one is empty, too long for the context, or holds an unknown token.
    """
    if prompts:
        _check_crossing(model, prompts, max_new_tokens)
    if is_recurrent(model) and len({len(prompt) for prompt in prompts}) > 1:
        raise DecodingError(
            "prompts of one batch must be of one length for a model whose layers carry a state of all the past",
            f"lengths from {min(map(len, prompts))} to {max(map(len, prompts))} tokens",
            "Give prompts one at a time",
        )
    if not prompts:
        raise DecodingError("there must be a prompt", "none", "Give one or more, as lists of token ids")
    check_each_prompt(model, prompts, max_new_tokens)


def check_each_prompt(model: MtpModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse a prompt that the model cannot go on from, whatever batch it is in.

    Raises:
        DecodingError: One is empty, too long for the context, or holds an unknown token.
    """
    vocab_size, context = model.section.vocab_size, model.section.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DecodingError(
                "a prompt must hold a token", f"prompt {number} of {len(prompts)}, which is empty", "Give it a text"
            )
        if len(prompt) + max_new_tokens > context:
            remaining = context - len(prompt)
            raise DecodingError(
                f"prompt and new tokens together must fit the context, model.max_position_embeddings = {context:,}",
                f"prompt {number} of {len(prompts)} with {len(prompt):,} tokens, and {max_new_tokens:,} new ones",
                f"Ask for at most {remaining:,} new tokens"
                if remaining > 0
                else f"Cut the prompt below {context:,} tokens",
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            unknown = next(token for token in prompt if not 0 <= token < vocab_size)
            raise DecodingError(
                f"every token id must lie in 0 to V - 1 = {vocab_size - 1:,}",
                f"id {unknown:,} in prompt {number} of {len(prompts)}",
                "Encode the prompt with the tokenizer that the model was trained with",
            )
