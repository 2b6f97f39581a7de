# Copyright the mtp_lightning authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0. Provided as it is, without warranties or conditions of any kind.
"""A causal model with the extra heads that it was trained with, which draft for `generate(..., use_mtp=True)`.

The trunk is transformers' own class, and transformers verifies the drafts: greedy text is that of plain greedy, and
sampled text has the law of plain sampling. Only drafting is told here. What the heads are is told by `mtp_config` in
config.json. A text has one row, as in all of transformers' assisted generation.
"""

import base64
import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, LlamaForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import create_causal_mask


class MedusaBlock(nn.Module):
    """Adds SiLU of a linear map."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        """Transform each position: (1, T, D) -> (1, T, D)."""
        return hidden + functional.silu(self.linear(hidden))


class ExtraHead(nn.Module):
    """The parts of one head beside the main one, by its kind."""

    def __init__(self, model, told):
        super().__init__()
        kind, depth, width = told["head_type"], told["layers_per_head"], model.config.hidden_size
        if kind in ("parallel", "chained", "sequential", "recursive"):  # layers like the trunk's last
            self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.trunk_layers[-depth:])
        if kind in ("sequential", "recursive"):
            self.enorm, self.hnorm, self.norm = (copy.deepcopy(model.final_norm) for _ in range(3))
            self.eh_proj = nn.Linear(2 * width, width, bias=False)
        if kind == "linear":
            self.map = nn.Linear(width, width, bias=False)
        if kind == "medusa":
            self.blocks = nn.Sequential(*(MedusaBlock(width) for _ in range(depth)))


class LlamaWithHeads(LlamaForCausalLM):
    """The model: the trunk's own class, and beside it `extra_heads`."""

    def __init__(self, config):
        super().__init__(config)
        told = config.mtp_config
        self.extra_heads = nn.ModuleList(ExtraHead(self, told) for _ in range(told["num_modules"]))
        num_matrices = told["num_drafts"] if told["unembedding"] == "replicated" else 0
        self.extra_lm_heads = nn.ModuleList(copy.deepcopy(self.get_output_embeddings()) for _ in range(num_matrices))
        self.post_init()

    @property
    def trunk_layers(self):
        """The trunk's layers."""
        return self.get_submodule(self.config.mtp_config["layers"])

    @property
    def final_norm(self):
        """What the last layer's state passes before the unembedding."""
        return self.get_submodule(self.config.mtp_config["final_norm"])

    def _assisted_decoding(self, *inputs, generation_config, **model_kwargs):
        if not generation_config.use_mtp:
            return super()._assisted_decoding(*inputs, generation_config=generation_config, **model_kwargs)
        past = model_kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError("use_mtp must begin with an empty cache: past_key_values knows nothing of the extra heads")
        if generation_config.assistant_ensemble_weight is not None:
            raise ValueError("assistant_ensemble_weight must not be set with use_mtp, which changes no text")
        self.calls = {}  # what each module below was last called with
        modules = [*self.trunk_layers, self.final_norm]
        hooks = [
            module.register_forward_pre_hook(partial(self._note, number), with_kwargs=True)
            for number, module in enumerate(modules)
        ]
        try:
            return super()._assisted_decoding(*inputs, generation_config=generation_config, **model_kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            del self.calls

    def _note(self, number, module, inputs, options):
        self.calls[number] = (inputs, options)

    def _get_candidate_generator(self, generation_config, **inputs):
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config=generation_config, **inputs)
        reads_tokens = self.config.mtp_config["head_type"] in ("sequential", "recursive")
        return TokenDrafts(self) if reads_tokens else StateDrafts(self)


# the files name the trunk's tensors as those of its own class do
for known in (LlamaForCausalLM.__name__, LlamaForCausalLM.config_class.model_type):
    if renamed := get_checkpoint_conversion_mapping(known):
        register_checkpoint_conversion_mapping(LlamaWithHeads.__name__, renamed, overwrite=True)
        break


class Drafts(CandidateGenerator):
    """What both ways of drafting have in common."""

    requires_model_outputs = True
    model_kwargs_overrides = {}  # noqa: RUF012

    def __init__(self, model):
        self.model, self.told = model, model.config.mtp_config
        self.heads, self.num_drafts = model.extra_heads, self.told["num_drafts"]
        self.last, self.length = len(model.trunk_layers), 0  # of the trunk's layers; of positions that are kept
        first = self.last - self.told["layers_per_head"]
        self.like_layers = range(first, self.last)
        self.caches = [DynamicCache(config=model.config) for _ in range(self.num_drafts)]
        for cache in self.caches:
            cache.activate_past_recording()
        packed = self.told["draft_token_ids"]  # as a set of bits
        bits = [byte >> bit & 1 for byte in base64.b64decode(packed or "") for bit in range(8)]
        self.ids = torch.tensor(bits, device=model.device).nonzero()[:, 0] if packed else None
        matrices = [*model.extra_lm_heads] or [model.get_output_embeddings()]
        self.matrices = [self._rows(matrix) for matrix in matrices]

    def _rows(self, matrix):
        """Rows of an unembedding, (V', D), and of its bias, that score what may be drafted."""
        weight, bias = matrix.weight, matrix.bias
        return (weight, bias) if self.ids is None else (weight[self.ids], None if bias is None else bias[self.ids])

    def count_new(self, input_ids):
        """Take what the trunk was last called with, and count the positions of it that are kept."""
        self.calls = dict(self.model.calls)  # drafting calls the final norm again
        num_new = input_ids.shape[1] - 1 - self.length  # the newest token has been given to no layer
        self.length += num_new
        return num_new

    def choose(self, number, state):
        """Choose the token that a head drafts: (1, D) -> (1, 1)."""
        best = functional.linear(state, *self.matrices[number % len(self.matrices)]).argmax(-1, keepdim=True)
        return best if self.ids is None else self.ids[best]

    def run(self, number, layers, state, **changed):
        """Run layers as the trunk's last ones were called, on the past of a head: (1, T, D) -> (1, T, D)."""
        for like, layer in zip(self.like_layers, layers, strict=True):
            inputs, options = self.calls[like]
            options = {name: value for name, value in options.items() if name != "hidden_states"} | changed
            past = self.caches[number]
            inputs = [past if isinstance(value, Cache) else value for value in inputs[1:]]
            options = {name: past if isinstance(value, Cache) else value for name, value in options.items()}
            output = layer(state, *inputs, **options)
            state = output[0] if isinstance(output, tuple) else output
        return state

    def state_before(self, number):
        """State that a layer of the trunk (or, behind the last, the final norm) was called with: (1, T, D)."""
        inputs, options = self.calls[number]
        return inputs[0] if inputs else options["hidden_states"]


class StateDrafts(Drafts):
    """Heads that read no tokens: they run over all positions that the trunk has verified, and forget the rejected."""

    def get_candidates(self, input_ids, is_first_iteration, **further):
        """Draft a token with every head, from the state of the last position that is kept."""
        if is_first_iteration:
            return input_ids, None  # the trunk reads the prompt first
        kept = self.count_new(input_ids) - 1
        state = self.state_before(self.last)
        depth, norm, drafts = self.told["layers_per_head"], self.model.final_norm, []
        for number in range(self.num_drafts):
            kind = self.told["head_type"]
            head = self.heads[number] if len(self.heads) else None
            if kind == "parallel":
                state = self.run(number, head.layers, self.state_before(self.last - depth))
            elif kind == "linear":
                state = head.map(self.state_before(self.last))
            elif kind == "medusa":
                state = head.blocks(norm(self.state_before(self.last)))
            elif head is not None:  # chained from the first offset to the last
                state = self.run(number, head.layers, state)
            else:  # and from the last to the first: the trunk's last layers are the heads
                state = self.state_before(self.last - (number + 1) * depth)
            last = state[:, kept]
            drafts.append(self.choose(number, last if kind == "medusa" else norm(last)))
            self.caches[number].crop(kept + 1 - state.shape[1])
        return torch.cat([input_ids, *drafts], dim=1), None


class TokenDrafts(Drafts):
    """Modules that read tokens: each reads what the one before has drafted, and later the token that was kept."""

    states = None  # (1, T, D) of all positions that are kept

    def get_candidates(self, input_ids, model_kwargs, is_first_iteration, **further):
        """Draft a token with every module, from the first position at which the last one has read a guess."""
        if is_first_iteration:
            return input_ids, None
        model, is_normed = self.model, self.told["hidden_source"] == "post_norm"
        before, num_new = self.length, self.count_new(input_ids)
        new = self.state_before(self.last)[:, :num_new]
        new = model.final_norm(new) if is_normed else new
        self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        start, end = max(before - self.num_drafts + 1, 0), self.length
        state, tokens, drafts = self.states[:, start:], input_ids[:, start + 1 :], []
        for number in range(self.num_drafts):
            head = self.heads[min(number, len(self.heads) - 1)]
            self.caches[number].crop(start - before)
            pair = [head.enorm(model.get_input_embeddings()(tokens)), head.hnorm(state)]
            pair = pair if self.told["concatenation"] == "embedding_first" else pair[::-1]
            joined = head.eh_proj(torch.cat(pair, dim=-1))
            state = self.run(number, head.layers, joined, **self._window(number, joined, start, end, model_kwargs))
            normed = head.norm(state)
            state = normed if is_normed else state
            drafts.append(self.choose(number, normed[:, -1]))
            tokens = torch.cat([tokens[:, 1:], drafts[-1]], dim=1)
        return torch.cat([input_ids, *drafts], dim=1), None

    def _window(self, number, state, start, end, model_kwargs):
        """Positions and mask for some positions behind the past of a module."""
        positions, mask = model_kwargs["position_ids"][:, start:end], model_kwargs.get("attention_mask")
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=state,
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=self.caches[number],
            position_ids=positions,
            layer_idx=self.last - 1,
        )
        rotary = self.model.get_decoder().rotary_emb(state, position_ids=positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
