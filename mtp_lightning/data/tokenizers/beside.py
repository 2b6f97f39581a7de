"""What the files beside a `tokenizer.json` add to it, as transformers reads them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mtp_lightning.data.tokenizers.chat import CONFIG, SPECIAL_TOKENS, content_of, named_tokens, read_object
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown

NAME, ADDED = "tokenizer.json", "added_tokens.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@final
@dataclass(frozen=True, kw_only=True)
class Beside:
    """Settings of a tokenizer that are not in its `tokenizer.json`.

    Attributes:
        tokens: special tokens by their names, such as `eos_token`.
        added: tokens to add if the vocabulary has not marked them yet, in order; each with its flags.
        odd_end: an `eos_token` that is none, such as a list of several.
        splits_special_tokens: whether special tokens in a text are text, whatever is asked for.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    added: tuple[Mapping[str, Any], ...] = ()
    odd_end: str | None = None
    splits_special_tokens: bool = False

    def add_tokens(self, tokenizer: Any, make: Callable[..., Any]) -> str:
        """Add the tokens that the tokenizer does not have; return what describes them, empty for none."""
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        new = [token for token in self.added if token["content"] not in known]
        tokenizer.add_tokens([make(**token) for token in new])
        return json.dumps(new) if new else ""


def config_beside(path: Path) -> Beside:
    """Read the files beside a file called `tokenizer.json`; of another name it stands alone.

    Raises:
        DataError: One of them is damaged.
    """
    if path.name != NAME:
        return Beside()
    folder = path.parent
    config = read_object(folder / CONFIG)
    named = named_tokens(folder, config)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        numbered = sorted((int(number), token) for number, token in listed.items() if number.isdecimal())
        added = [_token(token, is_special=False) for _, token in numbered]
        legacy: dict[str, Any] = {}
    else:
        legacy = read_object(folder / SPECIAL_TOKENS)
        numbers = {name: number for name, number in read_object(folder / ADDED).items() if isinstance(number, int)}
        added = [_token(name, is_special=name in named.values()) for name in sorted(numbers, key=numbers.__getitem__)]
    both = {**config, **legacy}
    extra = both.get("extra_special_tokens") or both.get("additional_special_tokens") or []
    special = [both.get(name, token) for name, token in named.items()]
    special += extra if isinstance(extra, list) else []
    added += [_token(token, is_special=True) for token in special]
    firsts: dict[str, dict[str, Any]] = {}
    for token in added:
        firsts.setdefault(token["content"], token)
    end = both.get("eos_token")
    return Beside(
        tokens=named,
        odd_end=None if end is None or content_of(end) is not None else repr(end),
        added=tuple(token for token in firsts.values() if token["content"]),
        splits_special_tokens=config.get("split_special_tokens") is True,
    )


def _token(token: Any, *, is_special: bool) -> dict[str, Any]:
    """Return what the library makes a token from."""
    flags = {name: token[name] for name in FLAGS if name in token} if isinstance(token, dict) else {}
    if odd := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise DataError(
            f"{odd[0]} of an added token must be true or false",
            f"{shown(repr(flags[odd[0]]))} of {shown(repr(token.get('content')))}",
            "Correct it in tokenizer_config.json or special_tokens_map.json, or download the files again",
        )
    is_special = is_special or (isinstance(token, dict) and token.get("special") is True)
    return {"content": content_of(token) or "", "normalized": not is_special, **flags, "special": is_special}
