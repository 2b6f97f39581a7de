# Copyright the mtp_lightning authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0. Provided as it is, without warranties or conditions of any kind.
"""A causal model with the extra heads that it was trained with, which draft for `generate(..., use_mtp=True)`.

The trunk is transformers' own class, and transformers verifies the drafts, of one text at a time: greedy text is that
of plain greedy, sampled text has the law of plain sampling. `mtp_config` in config.json says what the heads are.
"""

import base64
import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, LlamaForCausalLM, conversion_mapping
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.masking_utils import create_causal_mask


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
            self.blocks = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(width, width)}) for _ in range(depth))


class LlamaWithHeads(LlamaForCausalLM):
    """The model: the trunk's own class, and beside it `extra_heads`."""

    trunk_layers = property(lambda self: self.get_submodule(self.config.mtp_config["layers"]))
    final_norm = property(lambda self: self.get_submodule(self.config.mtp_config["final_norm"]))

    def __init__(self, config):
        super().__init__(config)
        told = config.mtp_config
        self.extra_heads = nn.ModuleList(ExtraHead(self, told) for _ in range(told["num_modules"]))
        num_matrices = told["num_drafts"] if told["unembedding"] == "replicated" else 0
        self.extra_lm_heads = nn.ModuleList(copy.deepcopy(self.get_output_embeddings()) for _ in range(num_matrices))
        self.post_init()

    def _assisted_decoding(self, *inputs, generation_config, **model_kwargs):
        if not generation_config.use_mtp:
            return super()._assisted_decoding(*inputs, generation_config=generation_config, **model_kwargs)
        if (past := model_kwargs.get("past_key_values")) is not None and past.get_seq_length():
            raise ValueError("use_mtp must begin with an empty cache: past_key_values knows nothing of the extra heads")
        if generation_config.assistant_ensemble_weight is not None:
            raise ValueError("assistant_ensemble_weight must not be set with use_mtp, which changes no text")
        self.calls = {}  # what each module was last called with: its state, and everything else
        hooks = [
            module.register_forward_pre_hook(partial(self._note, number), with_kwargs=True)
            for number, module in enumerate([*self.trunk_layers, self.final_norm])
        ]
        try:
            return super()._assisted_decoding(*inputs, generation_config=generation_config, **model_kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            del self.calls

    def _note(self, number, module, inputs, options):
        inputs, options = list(inputs), dict(options)
        state = inputs.pop(0) if inputs else options.pop("hidden_states")
        self.calls[number] = (state, inputs, options)

    def _get_candidate_generator(self, generation_config, **inputs):
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config=generation_config, **inputs)
        reads_tokens = self.config.mtp_config["head_type"] in ("sequential", "recursive")
        return TokenDrafts(self) if reads_tokens else StateDrafts(self)


for known in (LlamaForCausalLM.__name__, LlamaForCausalLM.config_class.model_type):
    if renamed := conversion_mapping.get_checkpoint_conversion_mapping(known):  # how the trunk's files name tensors
        conversion_mapping.register_checkpoint_conversion_mapping(LlamaWithHeads.__name__, renamed, overwrite=True)
        break


class Drafts(CandidateGenerator):
    """What both ways of drafting have in common."""

    requires_model_outputs = True
    model_kwargs_overrides = {}  # noqa: RUF012

    def __init__(self, model):
        self.model, self.told, self.heads = model, model.config.mtp_config, model.extra_heads
        self.depth, self.last = self.told["layers_per_head"], len(model.trunk_layers)
        self.length = 0  # positions that are kept
        self.caches = [DynamicCache(config=model.config) for _ in range(self.told["num_drafts"])]
        for cache in self.caches:
            cache.activate_past_recording()
        packed = base64.b64decode(self.told["draft_token_ids"] or "")  # a set of bits; empty: all ids
        bits = [byte >> bit & 1 for byte in packed for bit in range(8)]
        self.ids = torch.tensor(bits, device=model.device).nonzero()[:, 0] if bits else slice(None)
        matrices = [(one.weight, one.bias) for one in model.extra_lm_heads or [model.get_output_embeddings()]]
        self.matrices = [(weight[self.ids], None if bias is None else bias[self.ids]) for weight, bias in matrices]

    def count_new(self, input_ids):
        """Take what the trunk was last called with, and count the positions of it that are kept."""
        self.calls = dict(self.model.calls)  # drafting calls the final norm again
        num_new = input_ids.shape[1] - 1 - self.length  # the newest token has been given to no layer
        self.length += num_new
        return num_new

    def forget(self, past, num_positions):
        """Take the last positions out of the past of a head, of which only few layers are ever run."""
        [layer.crop(-num_positions) for layer in past.layers if layer.is_initialized]

    def choose(self, number, state):
        """Choose the token that a head drafts, or that each of several does: (K, D) -> (K, 1)."""
        best = functional.linear(state, *self.matrices[number % len(self.matrices)]).argmax(-1, keepdim=True)
        return best if isinstance(self.ids, slice) else self.ids[best]

    def run(self, past, layers, state, **changed):
        """Run layers as the trunk's last ones were called, on the past of a head: (1, T, D) -> (1, T, D)."""
        for place, layer in enumerate(layers, self.last - len(layers)):
            _, inputs, options = self.calls[place]
            inputs = [past if isinstance(one, Cache) else one for one in inputs]
            options = {name: past if isinstance(one, Cache) else one for name, one in (options | changed).items()}
            output = layer(state, *inputs, **options)
            state = output[0] if isinstance(output, tuple) else output
        return state


class StateDrafts(Drafts):
    """Heads that read no tokens: they run over all positions that the trunk has verified, and forget the rejected."""

    def get_candidates(self, input_ids, is_first_iteration, **further):
        """Draft a token with every head, from the state of the last position that is kept."""
        if is_first_iteration:
            return input_ids, None  # the trunk reads the prompt first
        kept, kind, norm, states = self.count_new(input_ids) - 1, self.told["head_type"], self.model.final_norm, []
        trunk = chained = self.calls[self.last][0]  # (1, T, D)
        for number, past in enumerate(self.caches):
            if kind == "linear":
                state = self.heads[number].map(trunk)
            elif kind == "medusa":
                state = norm(trunk)
                for block in self.heads[number].blocks:
                    state = state + functional.silu(block["linear"](state))
            elif kind == "parallel":
                state = self.run(past, self.heads[number].layers, self.calls[self.last - self.depth][0])
            elif self.told["order"] == "causal":
                state = chained = self.run(past, self.heads[number].layers, chained)
            else:  # chained from the last offset to the first: the trunk's last layers are the heads
                state = self.calls[self.last - (number + 1) * self.depth][0]
            states.append(state[:, kept] if kind == "medusa" else norm(state[:, kept]))
            self.forget(past, state.shape[1] - kept - 1)
        if len(self.matrices) == 1:  # it is read once for all
            return torch.cat([input_ids, self.choose(0, torch.cat(states)).T], dim=1), None
        return torch.cat([input_ids, *(self.choose(number, state) for number, state in enumerate(states))], dim=1), None


class TokenDrafts(Drafts):
    """Modules that read tokens: each reads what the one before has drafted, and later the token that was kept."""

    states = None  # (1, T, D) of all positions that are kept

    def get_candidates(self, input_ids, model_kwargs, is_first_iteration, **further):
        """Draft a token with every module, from the first position at which the last one has read a guess."""
        if is_first_iteration:
            return input_ids, None
        model, before, is_normed = self.model, self.length, self.told["hidden_source"] == "post_norm"
        num_new = self.count_new(input_ids)
        new = self.calls[self.last][0][:, :num_new]
        new = model.final_norm(new) if is_normed else new
        self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        start = max(before - len(self.caches) + 1, 0)
        state, tokens, drafts = self.states[:, start:], input_ids[:, start + 1 :], []
        positions, mask = model_kwargs["position_ids"][:, start : self.length], model_kwargs.get("attention_mask")
        rotary = model.get_decoder().rotary_emb(state, position_ids=positions)
        options = {"position_ids": positions, "position_embeddings": rotary}
        for number, past in enumerate(self.caches):
            self.forget(past, before - start)
            options["attention_mask"] = create_causal_mask(
                config=model.config,
                inputs_embeds=state,
                attention_mask=None if mask is None else mask[:, : self.length],
                past_key_values=past,
                position_ids=positions,
                layer_idx=self.last - 1,
            )
            head = self.heads[number % len(self.heads)]
            pair = [head.enorm(model.get_input_embeddings()(tokens)), head.hnorm(state)]
            pair = pair if self.told["concatenation"] == "embedding_first" else pair[::-1]
            state = self.run(past, head.layers, head.eh_proj(torch.cat(pair, dim=-1)), **options)
            state, normed = (head.norm(state),) * 2 if is_normed else (state, head.norm(state))
            drafts.append(self.choose(number, normed[:, -1]))
            tokens = torch.cat([tokens[:, 1:], drafts[-1]], dim=1)
        return torch.cat([input_ids, *drafts], dim=1), None
