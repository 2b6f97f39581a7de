"""Which parameters are matrices of layers: what Muon steps."""

from torch import nn

from mtp_lightning.model.roles import role_of

HIDDEN_ROLES = ("trunk", "heads")


def hidden_matrices(module: nn.Module) -> set[str]:
    """Name the trainable matrices of layers in trunk and heads: of two dimensions, and no embeddings."""
    embeddings = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return {
        name
        for name, p in module.named_parameters()
        if p.requires_grad
        and id(p) not in embeddings
        and role_of(name) in HIDDEN_ROLES
        and len(getattr(p, "ds_shape", p.shape)) == 2  # under ZeRO-3 a parameter has no shape of its own
    }
