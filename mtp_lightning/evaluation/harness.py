"""lm-evaluation-harness: its tasks and metrics, our forward passes and decoders. The one file that imports it.

`HarnessModel` is a model of that library, for its `simple_evaluate`. Figures are those of its own class for
Hugging Face models on the exported folder: the same tokens, the same truncation, the same stops.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, final

import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.carried_files import all_end_ids
from mtp_lightning.console.progress import counted
from mtp_lightning.decode import Settings, generate
from mtp_lightning.decode.packed_linear import pack_linear_maps
from mtp_lightning.decode.settings import ADAPTIVE, resolve_decoder
from mtp_lightning.decode.state import main_path
from mtp_lightning.decode.statistics import Statistics
from mtp_lightning.decode.text_stream import detokenizer
from mtp_lightning.decode.transformers_windows import is_recurrent, rotary_switch
from mtp_lightning.errors import DataError, DecodingError
from mtp_lightning.evaluation.harness_text import HarnessText

try:
    import lm_eval.api.metrics  # which registers them
    import lm_eval.loggers
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise DataError(
        "tasks of lm-evaluation-harness need the package lm-eval", str(error), "pip install 'mtp_lightning[eval]'"
    ) from error

__all__ = ["HarnessModel", "lm_eval"]  # also for the runner of tasks, which imports the library from here

BatchSize = int | Literal["auto"]
T = TypeVar("T")
MOST_ROWS = 64
BATCH_TOKENS = {"cuda": 2**15, "cpu": 2**12}
"""Tokens of a batch whose size is found by itself, before memory has run out."""
NEW_TOKENS = 256  # that a task without a number of its own may generate, as in lm-evaluation-harness
NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}
"""Settings of other libraries that change nothing at these values, and are refused at others."""
Request = tuple[Any, list[int], list[int]]
"""What was asked, tokens of the context, tokens of the continuation."""


@final
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A trained model for `lm_eval.simple_evaluate`: `simple_evaluate(model=HarnessModel("runs/mine"), tasks=[...])`.

    Attributes:
        statistics: what drafting achieved, one entry per batch of generated texts.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: BatchSize = "auto",
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        """Load a model.

        Args:
            path: run, checkpoint or exported folder.
            device: where to compute.
            dtype: type of the weights; None takes the stored one.
            batch_size: rows of a batch; `auto` takes as many as hold some thousand tokens, and half of them again
                wherever memory runs out.
            max_length: longest window in tokens; the model's context unless given.
            seed: of texts that are drawn.

        Raises:
            CheckpointError: There is nothing to load, or it is damaged.
            DataError: The model has no tokenizer.
            DecodingError: `batch_size` or `max_length` makes no sense.
        """
        super().__init__()
        self.recipe, self.model = load_model(path, device=device, dtype=dtype)
        pack_linear_maps(self.model)
        self.text, self.path, self.seed, self.batch_size = HarnessText(self.recipe), Path(path), seed, batch_size
        context = self.recipe.model.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        self._device = torch.device(device)
        self.statistics: list[Statistics] = []
        if batch_size != "auto" and batch_size < 1:
            raise DecodingError("a batch must hold a row", str(batch_size), "Give 1 or more, or auto")
        if not 1 <= self.max_length <= context:
            expected = f"max_length must lie in 1 to model.max_position_embeddings = {context:,}"
            raise DecodingError(expected, str(max_length), "Give less, or leave it out")

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.text.end

    @property
    def prefix_token_id(self) -> int:
        """Id before a text without context."""
        return self.text.prefix

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a text whose task does not say how many."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the cache of requests."""
        return self.recipe.data.tokenizer.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model in the file of results."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = self.model.trunk.embed_tokens.weight.dtype
        return {"model_num_parameters": parameters, "model_dtype": str(dtype), "num_offsets": self.model.num_offsets}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Return the ids of a text."""
        return self.text.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the chat template, for the file of results."""
        return self.text.template.templates.get("default") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return the text of a chat."""
        return self.text.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
        """Score continuations of contexts: log-probability in nats, and whether greedy decoding would write them."""
        for request in requests:
            if not any(request.args):
                raise _empty_continuation("", "")
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], **_options: Any) -> list[float]:
        """Score whole texts, in windows that begin with the last token of the one before."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += scored[0]
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[tuple[float, bool]]:
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)  # one forward for all that end in another token
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise _empty_continuation(*(texts or ("", "")))
            if len(continuation) > self.max_length:
                raise DecodingError(
                    f"a continuation must fit the context, {self.max_length:,} tokens",
                    f"{len(continuation):,} tokens: {texts[1][:60]!r}",
                    "Take a task of shorter answers, or loglikelihood_rolling for whole texts",
                )
            asked[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with counted("Scoring", total=len(requests), unit="continuations") as advance:
            for batch in self._batches({tokens: len(tokens) for tokens in asked}):
                targets = [[requests[number][2] for number in asked[tokens]] for tokens in batch]
                pairs = list(zip(batch, targets, strict=True))
                for tokens, scored in zip(batch, in_halves(pairs, self._score), strict=True):
                    for number, answer in zip(asked[tokens], scored, strict=True):
                        answers[number] = answer
                    advance(len(scored))
        return answers

    def _score(self, rows: Sequence[tuple[tuple[int, ...], list[list[int]]]]) -> list[list[tuple[float, bool]]]:
        """Score the continuations that end each row of tokens, behind its last one."""
        longest = max(len(tokens) for tokens, _ in rows) + self.model.num_offsets
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in rows], device=self._device)
        hidden = self.model.hidden_states(padded, torch.zeros_like(padded), offsets=main_path(self.model))[1]
        return [
            self._answers(state[len(tokens) - max(map(len, targets)) : len(tokens)], targets)
            for state, (tokens, targets) in zip(hidden, rows, strict=True)
        ]

    def _answers(self, states: torch.Tensor, continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Score continuations that end with the last of (T, D) states."""
        logits = self.model.unembedding.logits(1, states)
        logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (T, V)
        likeliest, answers = logits.argmax(-1), []
        for continuation in continuations:
            targets = torch.tensor(continuation, device=self._device)
            own = logprobs[-len(targets) :].gather(1, targets[:, None])
            answers.append((float(own.sum()), bool((likeliest[-len(targets) :] == targets).all())))
        return answers

    def _batches(self, lengths: Mapping[T, int]) -> list[list[T]]:
        """Cut rows of some lengths in tokens into batches, the longest first."""
        rows = sorted(lengths, key=lambda row: -lengths[row])
        most_tokens = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"])
        batches = []
        while rows:
            fitting = max(1, min(MOST_ROWS, most_tokens // lengths[rows[0]]))
            size = fitting if self.batch_size == "auto" else self.batch_size
            batches.append(rows[:size])
            rows = rows[size:]
        return batches

    def generate_until(self, requests: Sequence[Any], **_options: Any) -> list[str]:
        """Continue contexts up to a stop string or `max_gen_toks`, the heads drafting."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with counted("Generating", total=len(requests), unit="texts") as advance:
            for numbers in groups.values():
                settings, stops = self._settings(requests[numbers[0]].args[1])
                room = self.max_length - settings.max_new_tokens
                contexts = {
                    number: (self.tok_encode(requests[number].args[0]) or [self.prefix_token_id])[-room:]
                    for number in numbers
                }
                lengths = {number: len(own) + settings.max_new_tokens for number, own in contexts.items()}
                for batch in self._batches(lengths):
                    written = in_halves([contexts[number] for number in batch], partial(self._write, settings))
                    for number, tokens in zip(batch, written, strict=True):
                        texts[number] = postprocess_generated_text(self.text.decode(tokens), stops, None)
                    advance(len(batch))
        return texts

    def _settings(self, told: Mapping[str, Any]) -> tuple[Settings, list[str]]:
        """Turn a task's generation_kwargs into settings, and the texts that end what is written."""
        given = dict(normalize_gen_kwargs(dict(told), NEW_TOKENS))
        stops = handle_stop_sequences(given.pop("until"), eos=self.text.end_text)
        length, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        told_temperature = float(given.pop("temperature", 1.0))
        temperature = told_temperature if sampled else 0.0
        narrowing = {"top_k": given.pop("top_k", None) or None, "top_p": given.pop("top_p", None)}
        for name, value in given.items():
            if name not in NEUTRAL or value != NEUTRAL[name]:
                known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
                raise DecodingError(f"generation_kwargs must be among {known}", f"{name}: {value}", f"Leave {name} out")
        if not 1 <= length < self.max_length:
            raise DecodingError(
                f"max_gen_toks must be at least 1, and below the context of {self.max_length:,} tokens",
                f"{length:,}",
                "Give another in the task's generation_kwargs, or --gen-kwargs max_gen_toks=N",
            )
        decoder = resolve_decoder(self.model, "auto")
        settings = Settings(
            max_new_tokens=length,
            draft_length=None if decoder in ("greedy", "tree") else ADAPTIVE,
            temperature=temperature,
            stop_tokens=all_end_ids(self.recipe, self.text.end, self.path),
            stop_strings=[stop.encode() for stop in stops if stop],
            detokenize=detokenizer(self.text.tokenizer),  # special tokens spelled out, for a stop may be one
            **(narrowing if temperature else {}),
        )
        return settings, stops

    def drafting(self) -> float | None:
        """Tokens per forward of all texts written so far; None where there are none, or nothing drafts."""
        forwards = sum(one.num_drafts for one in self.statistics)
        if not forwards or self.model.num_offsets == 1:
            return None
        return 1 + sum(one.num_accepted_tokens for one in self.statistics) / forwards

    def _write(self, settings: Settings, contexts: Sequence[list[int]]) -> list[list[int]]:
        """Write the tokens that follow each context, up to an end."""
        if len(contexts) > 1 and (is_recurrent(self.model) or rotary_switch(self.model) is not None):
            return [self._write(settings, [context])[0] for context in contexts]
        seed = self.seed + len(self.statistics)  # the same context may be asked for again, for another text
        done = generate(self.model, contexts, replace(settings, seed=seed))
        self.statistics.append(done.statistics)
        return done.tokens


def in_halves(rows: Sequence[T], run: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """Run a batch, or each half of it by itself where memory runs out.

    Raises:
        torch.OutOfMemoryError: There is not even room for one row.
    """
    try:
        return run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return in_halves(rows[:middle], run) + in_halves(rows[middle:], run)


def _empty_continuation(context: str, continuation: str) -> DataError:
    return DataError(
        "a continuation must have tokens of its own",
        f"{continuation[:60]!r} after {context[-60:]!r}",
        "Put a space or a line break between context and continuation: the tokenizer makes one token of both, or none",
    )
