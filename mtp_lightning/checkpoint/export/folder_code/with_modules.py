# Copyright the mtp_lightning authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0. Provided as it is, without warranties or conditions of any kind.
"""A causal model with the sequential modules that it was trained with, for `generate(..., use_mtp=True)`.

The trunk is transformers' own class, and so are the modules (`transformers.modeling_layers.MtpModel`), which stand in
the files as layers behind the trunk's last. What is missing in transformers 5.23 is told here: that those layers are
modules, and what to do while a text is not yet longer than there are modules.
"""

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.utils import ModelOutput


class LlamaWithModules(LlamaForCausalLM):
    """The model; everything is inherited."""

    def __init__(self, config):
        super().__init__(config)
        numbers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected |= {rf"^model\.layers\.{number}\." for number in numbers}

    def _get_candidate_generator(self, generation_config, **inputs):
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config=generation_config, **inputs)
        shared = {name: inputs[name] for name in ("logits_processor", "model_kwargs")}
        return ModuleDrafts(main_model=self, generation_config=generation_config, **shared)


class ModuleDrafts(MTPCandidateGenerator):
    """Drafts with the modules; after a rejection it runs them again over as many positions as there are modules."""

    def get_candidates(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **further):
        """Draft a token with every module; while the text is too short for that, run them over all of it."""
        num_new = n_last_matches + 1
        is_short = input_ids.shape[1] - 1 - num_new < self.num_mtp_layers
        if self.num_mtp_layers > 1 and is_short and not is_first_iteration and not self.is_main_model_prefill:
            states = (self.full_seq_last_hidden_states, model_outputs.hidden_states[-1][:, :num_new].to(self.device))
            model_outputs = ModelOutput(hidden_states=[torch.cat(states, dim=1)])
            self.mtp_cache = MtpCache(config=self.mtp_model.config)
            self.mtp_cache.activate_past_recording()
            self.is_main_model_prefill = True
        return super().get_candidates(
            input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **further
        )
