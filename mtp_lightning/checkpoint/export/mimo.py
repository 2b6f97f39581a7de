"""MiMo's layout, which vLLM and SGLang read: a Qwen2 trunk with biases, and one module on the state before the norm.

Its model type is Qwen2's, so that transformers opens the trunk and no engine has to run code of the folder's.
"""

from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.rewritten import (
    RewrittenWeights,
    filled,
    first_module,
    left_out,
    not_dense,
    not_modules,
    notes_on,
    refusal,
    settings_as,
)
from mtp_lightning.checkpoint.export.trunk import trunk_contents
from mtp_lightning.checkpoint.huggingface.modules import MIMO
from mtp_lightning.checkpoint.huggingface.weights import OutgoingWeights
from mtp_lightning.recipe import Recipe


def refuses_mimo(recipe: Recipe) -> Refusal | None:
    """Refuse what is not one pre-norm module on a trunk that Qwen2 can be."""
    heads, model = recipe.heads, recipe.model
    return refusal(
        "sequential or recursive modules of one layer that read the state before the final norm (heads.hidden: "
        "pre_norm) and share the main matrix, on a trunk of Llama's, Mistral's or Qwen2's kind",
        not_modules(heads)
        | {f"heads.hidden: {heads.hidden}": heads.hidden != "pre_norm"}
        | not_dense(recipe)
        | {
            "norms of queries and keys": model.qk_norm,
            "a bias behind attention": model.output_bias,
            f"head_dim {model.resolved_head_dim} of {model.num_attention_heads} heads": model.resolved_head_dim
            * model.num_attention_heads
            != model.hidden_size,
        },
    )


def mimo_contents(source: Source) -> dict[str, Contents]:
    """Trunk and first module; queries, keys and values get biases of zero where the model has none."""
    trunk, sources = trunk_contents(source), first_module(source, MIMO)
    weights = OutgoingWeights(source.reader, sources, source.section)
    biases = {
        name.removesuffix("weight") + "bias": filled(0.0, weights.shape(name)[0])
        for name in weights.names
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and not source.recipe.model.qkv_bias
    }
    settings = settings_as(source, trunk, "qwen2", qkv_bias=True)
    settings |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    return {
        "": Contents(
            weights=RewrittenWeights(weights, biases),
            settings=settings,
            written={name: one.stored for name, one in sources.items()},
            made=dict.fromkeys(biases, "zeros: Qwen2's attention has biases"),
            left_out=left_out(source, sources, MIMO.name),
            files=trunk.files,
            notes=notes_on(source.recipe),
        )
    }
