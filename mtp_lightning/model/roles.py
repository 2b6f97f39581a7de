"""Roles of parameters, by their names: what groups of the optimizer, norms and freezing are told apart by."""

ROLES = ("trunk", "heads", "unembedding", "lora", "layer_mix")
"""Parts of `MtpModel`, and what an adaptation adds to them."""
LORA = "lora"
LAYER_MIX = "layer_mix"


def role_of(parameter_name: str) -> str:
    """Role of a parameter of `MtpModel` by its name; a tied matrix is the trunk's embedding.

    >>> role_of("trunk.layers.0.self_attn.q_proj.weight"), role_of("trunk.layers.0.self_attn.q_proj.lora.up")
    ('trunk', 'lora')
    """
    parts = parameter_name.split(".")
    return LORA if LORA in parts else parts[0]
