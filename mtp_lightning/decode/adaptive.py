"""How many tokens to draft: as many as pay, by what has been kept so far and what a step costs.

Nothing is timed, so a text that is drawn by a seed is the same every time; and how many are drafted depends on the
text before alone, so it keeps the model's law.
"""

from collections.abc import Sequence
from typing import final

import torch

from mtp_lightning.decode.packed_linear import PackedLinear
from mtp_lightning.decode.state import main_path
from mtp_lightning.model.mtp_model import MtpModel

MEMORY = 0.95  # weight that an observation keeps when another one follows
BELIEF = 2.0  # observations that all drafts are kept, to begin with
FIRST_WAIT, LONGEST_WAIT = 16, 256  # steps until longer drafts are tried again
SHARE_OF_ONE_MORE = {"cpu": 0.2, "packed": 0.06, "cuda": 0.02}
"""What another token in a forward costs, in forwards of one token, of one text: on a GPU, and on a CPU by packed maps,
these wait for the weights to be read. A forward of r tokens costs 1 + share x (r - 1)."""


@final
class AdaptiveLength:
    """Chooses the length of the next draft."""

    def __init__(self, costs: Sequence[float]) -> None:
        """Begin with the cost of a step with 0, 1, ... drafts, in any unit."""
        self.costs = costs
        self.reached = [BELIEF] * (len(costs) - 1)  # drafts that were judged, by position, fading
        self.kept = [BELIEF] * (len(costs) - 1)
        self.wait = self.num_waiting = FIRST_WAIT

    def best(self) -> int:
        """Return the length that promises most tokens for its cost."""
        gains, expected, chance = [], 1.0, 1.0
        for length, cost in enumerate(self.costs):
            if length:
                chance *= self.kept[length - 1] / self.reached[length - 1]
                expected += chance
            gains.append(expected / cost)
        return max(range(len(gains)), key=gains.__getitem__)

    def choose(self) -> int:
        """Return the length of the next draft: the best one, now and then one more."""
        best = self.best()
        return best + 1 if best < len(self.costs) - 1 and self.num_waiting <= 0 else best

    def observe(self, length: int, accepted: Sequence[int]) -> None:
        """Take in one step: its drafts' length, and the drafts kept in every row that had not ended."""
        is_trial = length > self.best()
        for position in range(length):
            reached = sum(kept >= position for kept in accepted)
            if reached:
                kept = sum(kept > position for kept in accepted)
                self.reached[position] = MEMORY * self.reached[position] + reached
                self.kept[position] = MEMORY * self.kept[position] + kept
        if not is_trial:
            self.num_waiting -= 1
        elif sum(accepted) < len(accepted) * length:
            self.wait = min(2 * self.wait, LONGEST_WAIT)
            self.num_waiting = self.wait
        if self.best() == len(self.costs) - 1:
            self.wait = self.num_waiting = FIRST_WAIT


def step_costs(model: MtpModel, longest: int, num_rows: int = 1) -> list[float]:
    """Estimate what a step with 0, 1, ..., `longest` drafts costs, in weights read: texts decoded together share these.

    In a batch of `num_rows` texts a draft adds a token to every text, so the larger the batch, the nearer it comes to
    costing as much as the step itself.
    """
    is_packed = isinstance(model.unembedding.lm_heads[0], PackedLinear)
    device = "packed" if is_packed else model.trunk.embed_tokens.weight.device.type
    alone = SHARE_OF_ONE_MORE.get(device, SHARE_OF_ONE_MORE["cuda"])
    share = num_rows * alone / (1 + (num_rows - 1) * alone)
    path = main_path(model)
    matrix = _num_weights(model.unembedding.lm_heads[0])
    plain = _num_weights(model.trunk.layers) + sum(_num_weights_of(model, offset) for offset in path) + matrix
    drafts = matrix * model.unembedding.num_drafted // model.section.vocab_size
    costs = [float(plain)]
    for num_drafts in range(1, longest + 1):
        offset = num_drafts + 1
        is_read_again = num_drafts == 1 or model.unembedding.is_replicated or model.heads.reads_tokens
        drafting = drafts * (1.0 if is_read_again else share)
        if offset not in path:
            drafting += _num_weights_of(model, offset)
        costs.append(costs[-1] + share * plain + drafting)
    return costs


def _num_weights_of(model: MtpModel, offset: int) -> int:
    return sum(_num_weights(module) for module in model.heads.modules_of(offset))


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
