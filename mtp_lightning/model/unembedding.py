"""The unembedding: final norm and V x D matrix, the only place where the vocabulary exists."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mtp_lightning.losses.chunked import Term, chunked_loss
from mtp_lightning.losses.logit_map import LogitMap
from mtp_lightning.model.heads import Heads
from mtp_lightning.model.layers import build_norm
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.root import Recipe


class Unembedding(nn.Module):
    """Final norms and unembedding matrices of all offsets: shared, or one per offset."""

    def __init__(self, recipe: Recipe, heads: Heads) -> None:
        super().__init__()
        section = recipe.model
        self.norm_index = {offset: heads.norm_index(offset) for offset in heads.offsets}
        self.is_replicated = recipe.heads.unembedding == "replicated"
        num_norms = 1 + max(index for index in self.norm_index.values() if index is not None)
        num_matrices = recipe.heads.num_offsets if self.is_replicated else 1
        self.norms = nn.ModuleList(build_norm(section) for _ in range(num_norms))
        architecture = architecture_of(section) if section.is_foreign else None
        has_bias = architecture is not None and architecture.lm_head.bias is not None
        self.logit_map = LogitMap() if architecture is None else architecture.logit_map
        self.lm_heads = nn.ModuleList(
            nn.Linear(section.hidden_size, section.vocab_size, bias=has_bias) for _ in range(num_matrices)
        )
        self.token_order = (
            nn.Linear(section.hidden_size, section.vocab_size, bias=False) if recipe.objective.token_order else None
        )
        self.chunk_bytes = int(recipe.objective.chunk_mib * 2**20)

    def normalize(self, offset: int, hidden: Tensor) -> Tensor:
        """Apply the offset's final norm, if it has one: (B, T, D) -> (B, T, D)."""
        index = self.norm_index[offset]
        normed: Tensor = hidden if index is None else self.norms[index](hidden)
        return normed

    def matrix_index(self, offset: int) -> int:
        """Index in `lm_heads` of the matrix that scores this offset."""
        return offset - 1 if self.is_replicated else 0

    def logits(self, offset: int, hidden: Tensor) -> Tensor:
        """Score every token: (B, T, D) -> (B, T, V). For decoding and as an oracle."""
        scores: Tensor = self.lm_heads[self.matrix_index(offset)](self.normalize(offset, hidden))
        return self.logit_map(scores)

    def forward(
        self,
        offsets: Sequence[int],
        hiddens: Sequence[Tensor],
        terms: Sequence[Term],
        *,
        balance_to: Tensor | None = None,
        teacher: Tensor | None = None,
        teacher_learns: bool = False,
    ) -> Tensor:
        """Compute the weighted loss of some offsets' hidden states in chunks; see `chunked_loss`.

        Args:
            offsets: Offset whose final norm each hidden state passes.
            hiddens: (B, T, D) states, one per term.
            terms: What to compute from each; their `matrix` counts the matrices as in `matrices`.
            balance_to: RMS of the main head's loss, where it is known already.
            teacher: (B, T, D) states of the main head, for terms with a distillation.
            teacher_learns: Give them, the main head's final norm and its matrix a gradient from being compared with.
        """
        normed = [
            self.normalize(offset, hidden).flatten(0, 1)  # (B, T, D) -> (P, D)
            for offset, hidden in zip(offsets, hiddens, strict=True)
        ]
        modules = self._modules_by_number
        numbers = {term.matrix for term in terms}
        used: dict[int, Tensor] = {number: modules[number].weight for number in sorted(numbers)}
        biases: dict[int, Tensor] = {number: bias for number in used if (bias := modules[number].bias) is not None}
        if teacher is not None:
            with torch.set_grad_enabled(teacher_learns and torch.is_grad_enabled()):
                teacher = self.normalize(1, teacher).flatten(0, 1)  # (P, D)
            number = self.matrix_index(1)
            if number not in used:
                matrix = modules[number].weight
                used[number] = matrix if teacher_learns else matrix.detach()
                if (bias := modules[number].bias) is not None:
                    biases[number] = bias if teacher_learns else bias.detach()
        return chunked_loss(
            normed,
            used,
            terms,
            chunk_bytes=self.chunk_bytes,
            balance_to=balance_to,
            teacher=teacher,
            teacher_learns=teacher_learns,
            biases=biases,
            logit_maps={} if self.logit_map == LogitMap() else dict.fromkeys(range(len(self.lm_heads)), self.logit_map),
        )

    def parameters_of(self, offset: int) -> list[Tensor]:
        """Final norm and matrix of an offset, with the matrix's bias."""
        index = self.norm_index[offset]
        norm = [] if index is None else list(self.norms[index].parameters())
        return [*norm, *self.lm_heads[self.matrix_index(offset)].parameters()]

    @property
    def matrices(self) -> list[Tensor]:
        """All V x D matrices, the token-order one last."""
        return [module.weight for module in self._modules_by_number]

    @property
    def _modules_by_number(self) -> list[nn.Linear]:
        """What a term's `matrix` counts."""
        extra = [] if self.token_order is None else [self.token_order]
        return cast(list[nn.Linear], [*self.lm_heads, *extra])
