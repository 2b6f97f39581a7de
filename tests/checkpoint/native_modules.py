"""Tiny folders as published: a trunk of transformers' own classes, and modules whose layer is of the trunk's type.

Everything is written by transformers: a model with more layers is saved, and those behind the trunk are the modules'.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from tests.support.architectures import COMMON, EXPERTS, LATENT

GROUPED = LATENT | {"num_key_value_heads": 2, "head_dim": 8, "use_qk_norm": True}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
}
TYPES = ["linear_attention", "linear_attention", "full_attention"]
FULL = {"layer_types": ["full_attention"] * 3}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
DEEPSEEK = ("model.layers.{number}.", "", ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
QWEN = ("mtp.", "layers.0.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"))
DECLARED = {"DeepSeek": "num_nextn_predict_layers", "Qwen": "mtp_num_hidden_layers"}


class Case(NamedTuple):
    """A type of model, how many modules it has, in which layout, and its settings."""

    model_type: str
    settings: dict[str, Any]
    layout: str = "DeepSeek"
    num_modules: int = 1
    wrapper: str = ""


CASES = {
    "DeepSeek-V3": Case("deepseek_v3", LATENT, num_modules=2),
    "GLM-4-MoE": Case("glm4_moe", GROUPED),
    "GLM-4-MoE-Lite": Case("glm4_moe_lite", LATENT),
    "Qwen3-Next": Case("qwen3_next", EXPERTS | LINEAR | {"layer_types": TYPES}, "Qwen"),
    "Qwen3.5": Case("qwen3_5_text", LINEAR | {"layer_types": TYPES}, "Qwen"),
    "Qwen3.5-attention": Case("qwen3_5_text", LINEAR | FULL, "Qwen"),
    "Qwen3.5-MoE": Case("qwen3_5_moe_text", EXPERTS | LINEAR | FULL, "Qwen"),
    "Qwen3.5-VL": Case("qwen3_5_text", LINEAR | {"layer_types": TYPES}, "Qwen", wrapper="Qwen3_5"),
    "EXAONE-MoE": Case("exaone_moe", EXPERTS | {"n_group": 1, "topk_group": 1, **FULL}, "Qwen"),
}
RECURRENT = {name for name, case in CASES.items() if case.settings.get("layer_types") == TYPES}


class Oracle(NamedTuple):
    """The trunk, and the modules beside it, all of transformers' own classes."""

    model: Any
    decoder: Any
    num_layers: int
    modules: list[dict[str, Any]]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> list[Tensor]:
        """Score a text: (T, V) of the next token, then of each module with one position less."""
        embedded = self.decoder.embed_tokens(torch.tensor([tokens]))
        state = self.decoder.norm(self._run(range(self.num_layers), embedded))
        scores = [self.model.lm_head(state)[0]]
        for number, module in enumerate(self.modules):
            token, before = module["enorm"](embedded[:, 1 + number :]), module["hnorm"](state[:, :-1])
            inside = module["eh_proj"](torch.cat((token, before), -1))
            state = module["norm"](self._run([self.num_layers + number], inside))
            scores.append(self.model.lm_head(state)[0])
        return scores

    def _run(self, numbers: Any, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        places = torch.arange(length)[None]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        for number in numbers:
            layer = self.decoder.layers[number]
            seen = None if hasattr(layer, "linear_attn") else mask
            turned = self.decoder.rotary_emb(hidden, places)
            made = layer(hidden, attention_mask=seen, position_embeddings=turned, position_ids=places)
            hidden = made[0] if isinstance(made, tuple) else made
        return hidden


@torch.no_grad()
def write(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changed: Any) -> Oracle:
    """Write a folder, and return what is in it."""
    case = CASES[name]
    settings = COMMON | case.settings | changed
    count, num_layers = case.num_modules, settings["num_hidden_layers"]
    longer = settings | {"num_hidden_layers": num_layers + count}
    for types in [key for key in settings if key.endswith("layer_types")]:
        longer[types] = [*settings[types], *[settings[types][-1]] * count]
    torch.manual_seed(0)
    model = _built(case, longer).eval()
    for value in {id(one): one for one in model.state_dict().values()}.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape)
    decoder = model.get_decoder()
    decoder.embed_tokens.weight *= 20  # trunk and modules lean on the last token: some drafts are right
    model.to(dtype).save_pretrained(folder)
    modules = [_module(decoder) for _ in range(count)]
    prefix, inside, own = DEEPSEEK if case.layout == "DeepSeek" else QWEN
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    language = "model.language_model.layers." if case.wrapper else "model.layers."
    for number, module in enumerate(modules):
        beginning = prefix.format(number=num_layers + number)
        for tensor in [one for one in tensors if one.startswith(f"{language}{num_layers + number}.")]:
            behind = tensor.removeprefix(f"{language}{num_layers + number}.")
            tensors[f"{beginning}{inside}{behind}"] = tensors.pop(tensor)
        names = zip(own, module.values(), strict=True)
        tensors |= {f"{beginning}{one}.weight": part.weight.detach().to(dtype).clone() for one, part in names}
        if case.layout == "DeepSeek":  # copies, as published
            tensors[f"{beginning}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{beginning}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        module.to(dtype).float()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    text = told.get("text_config", told)
    text |= {key: value[:num_layers] for key, value in text.items() if key.endswith("layer_types")}
    text |= {"num_hidden_layers": num_layers, DECLARED[case.layout]: count}
    (folder / "config.json").write_text(json.dumps(told))
    return Oracle(model.float(), decoder, num_layers, modules)


def _built(case: Case, settings: dict[str, Any]) -> Any:
    if not case.wrapper:
        config = transformers.AutoConfig.for_model(case.model_type, **settings)
        return transformers.AutoModelForCausalLM.from_config(config)
    config = getattr(transformers, f"{case.wrapper}Config")(text_config=settings, vision_config=VISION)
    return getattr(transformers, f"{case.wrapper}ForConditionalGeneration")(config)


def _module(decoder: Any) -> nn.ModuleDict:
    """Norms and the projection of a module."""
    width, norm = decoder.norm.weight.shape[0], decoder.norm
    projection = nn.Linear(2 * width, width, bias=False)
    parts = {"enorm": deepcopy(norm), "hnorm": deepcopy(norm), "eh_proj": projection, "norm": deepcopy(norm)}
    for part in parts.values():
        part.weight += 0.1 * torch.randn(part.weight.shape)
    parts["eh_proj"].weight[:, :width] += 6 * torch.eye(width)
    return nn.ModuleDict(parts)
