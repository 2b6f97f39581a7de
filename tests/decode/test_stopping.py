"""Stop strings end a text with the token that completes one, wherever blocks begin and end."""

from mtp_lightning.decode import generate
from tests.decode.oracles import LENGTH, PROMPTS, WrittenDrafts, model_of, plain_texts, settings_of
from tests.support.covering import every_pair


def detokenize(tokens):
    """Tokens as text: some are several bytes, one is none."""
    spelled = b"".join([b"a", b"b", b"", b"ab", b"\n", b" ba", b"c"][token % 7] for token in tokens)
    return spelled.removeprefix(b" ")  # what a first token spells depends on its place


def cut_by_hand(prompt, text, strings):
    before = len(detokenize(prompt))
    for length in range(1, len(text) + 1):
        if any(string in detokenize([*prompt, *text[:length]])[before:] for string in strings):
            return text[:length]
    return text


@every_pair(
    kind=["parallel", "sequential", "medusa"],
    strings=[(b"ab",), (b"bab", b"aa"), (b"\n",), (b"abc", b"cc", b" ba")],
)
def test_text_ends_where_a_string_is_complete(kind, strings):
    model = model_of(kind)
    texts = plain_texts(model, PROMPTS)
    expected = [cut_by_hand(prompt, text[: LENGTH - 4], strings) for prompt, text in zip(PROMPTS, texts, strict=True)]
    forced_drafts = WrittenDrafts(model, PROMPTS, [[3], [2, 1], [0, 3], [1], [3, 2]])
    for chosen in settings_of(model, max_new_tokens=LENGTH - 4, stop_strings=strings, detokenize=detokenize):
        for drafts in (None, forced_drafts):
            made = generate(model, PROMPTS, chosen, forced_drafts=drafts)
            assert made.tokens == expected
            assert made.statistics.is_consistent
    assert any(len(text) < LENGTH - 4 for text in expected)
