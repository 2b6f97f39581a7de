"""The unembedding: final norm and V x D matrix, the only place where the vocabulary exists."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mtp_lightning.losses.chunked import Term, chunked_argmax, chunked_loss
from mtp_lightning.losses.distillation import Distillation
from mtp_lightning.losses.logit_map import LogitMap
from mtp_lightning.model.draft_vocabulary import DraftVocabulary, draft_vocabulary_of
from mtp_lightning.model.heads import Heads
from mtp_lightning.model.layers import build_norm
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.root import Recipe


class Unembedding(nn.Module):
    """Final norms and unembedding matrices of all offsets: shared, or one per offset.

    With a draft vocabulary offsets beyond the first score V' of the V entries, by those rows of their matrix.
    """

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
        self.objective = recipe.objective
        self.drafts = draft_vocabulary_of(recipe)
        self._kept_rows: dict[int, tuple[tuple[object, ...], Tensor]] = {}

    def chunk_bytes(self, hidden: Tensor) -> int:
        """Memory that one chunk of logits may take where these states are."""
        return self.objective.chunk_bytes(hidden.device.type)

    def normalize(self, offset: int, hidden: Tensor) -> Tensor:
        """Apply the offset's final norm, if it has one: (B, T, D) -> (B, T, D)."""
        index = self.norm_index[offset]
        normed: Tensor = hidden if index is None else self.norms[index](hidden)
        return normed

    def matrix_index(self, offset: int) -> int:
        """Index in `lm_heads` of the matrix that scores this offset."""
        return offset - 1 if self.is_replicated else 0

    def term_matrix(self, offset: int) -> int:
        """Number of the matrix that an offset's loss is computed with; below 0, of the rows of its draft vocabulary."""
        index = self.matrix_index(offset)
        return index if self.vocabulary(offset) is None else -1 - index

    @property
    def teacher_matrix(self) -> int:
        """Number of the matrix that scores the main head where others learn from it, the same entries as they do."""
        index = self.matrix_index(1)
        return index if self.drafts is None else -1 - index

    @property
    def num_drafted(self) -> int:
        """Number of ids that offsets beyond the first score: V, or V' of a draft vocabulary."""
        return self.lm_heads[0].out_features if self.drafts is None else self.drafts.size  # type: ignore[return-value]

    def vocabulary(self, offset: int) -> DraftVocabulary | None:
        """The ids that an offset scores; None for all V."""
        return self.drafts if offset > 1 else None

    def scored_targets(self, offset: int, targets: Tensor) -> Tensor:
        """Number targets as the offset's scores are; `IGNORE` for those that it does not score."""
        vocabulary = self.vocabulary(offset)
        return targets if vocabulary is None else vocabulary.places_of(targets)

    def logits(self, offset: int, hidden: Tensor) -> Tensor:
        """Score every token: (B, T, D) -> (B, T, V); minus infinity outside a draft vocabulary.

        For decoding and as an oracle.
        """
        vocabulary, scores = self.vocabulary(offset), self.all_logits(offset, hidden)
        return scores if vocabulary is None else vocabulary.spread(vocabulary.columns_of(scores), -torch.inf)

    def all_logits(self, offset: int, hidden: Tensor) -> Tensor:
        """Score every token, whatever the offset may draft: (B, T, D) -> (B, T, V)."""
        scores: Tensor = self.lm_heads[self.matrix_index(offset)](self.normalize(offset, hidden))
        return self.logit_map(scores)

    def draft_bias(self, index: int) -> Tensor | None:
        """What is added to the scores of the draft vocabulary by a matrix, (V',)."""
        return self._bias(-1 - index)

    def draft_rows(self, index: int) -> Tensor:
        """Rows of a matrix that score the draft vocabulary, (V', D): a copy that is kept where the matrix is frozen."""
        weight = self._modules_by_number[index].weight
        assert self.drafts is not None
        if weight.requires_grad or hasattr(weight, "ds_id"):  # under ZeRO-3 it lies here for a while only
            return self.drafts.rows_of(weight)
        version = 0 if weight.is_inference() else weight._version
        state = (weight.data_ptr(), version, weight.dtype, weight.device)
        if self._kept_rows.get(index, ((), weight))[0] != state:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._kept_rows[index] = (state, self.drafts.rows_of(weight))
        return self._kept_rows[index][1]

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
        numbers = {term.matrix for term in terms}
        used = {number: self._matrix(number) for number in sorted(numbers)}
        is_mapped = self.logit_map != LogitMap()
        biases = {number: bias for number in used if (bias := self._bias(number)) is not None}
        if teacher is not None:
            with torch.set_grad_enabled(teacher_learns and torch.is_grad_enabled()):
                teacher = self.normalize(1, teacher).flatten(0, 1)  # (P, D)
            compared = [term.distillation for term in terms if term.distillation is not None]
            self._judge_teacher(teacher, compared)
            number = compared[0].matrix
            if number not in used:
                matrix = self._matrix(number)
                used[number] = matrix if teacher_learns else matrix.detach()
                if (bias := self._bias(number)) is not None:
                    biases[number] = bias if teacher_learns else bias.detach()
        return chunked_loss(
            normed,
            used,
            terms,
            chunk_bytes=self.chunk_bytes(normed[0]),
            balance_to=balance_to,
            teacher=teacher,
            teacher_learns=teacher_learns,
            biases=biases,
            logit_maps={number: self.logit_map for number in used if number < len(self.lm_heads)} if is_mapped else {},
        )

    def _matrix(self, number: int) -> Tensor:
        return self.draft_rows(-1 - number) if number < 0 else self._modules_by_number[number].weight

    def _bias(self, number: int) -> Tensor | None:
        bias = self._modules_by_number[number if number >= 0 else -1 - number].bias
        if number >= 0 or bias is None or self.drafts is None:
            return bias
        return self.drafts.columns_of(bias)

    @torch.no_grad()
    def _judge_teacher(self, teacher: Tensor, compared: Sequence[Distillation]) -> None:
        """Find out, once for all offsets, where the main head's choice is one that can be drafted: (P, D) states."""
        matrix, bias = self._matrix(self.matrix_index(1)), self._bias(self.matrix_index(1))
        for one in compared:
            if one.drafted is not None and self.drafts is not None and one.drafted.rows is None:
                choices = chunked_argmax(teacher, matrix, self.chunk_bytes(teacher), bias)
                one.drafted.rows = ~self.drafts.lacks(choices)

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
