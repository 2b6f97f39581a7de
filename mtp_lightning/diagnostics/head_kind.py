"""Check a head kind as the laws check the package's own: gradients, counts and drafted text, on a small model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mtp_lightning.decode import Settings, applicable_decoders, build_tree, generate
from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.targets import count_targets, shifted_targets
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.recipe import Recipe, check_rules
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective

TOLERANCE = 1e-10  # relative, in float64
NUM_SEQUENCES, SEQ_LEN, VOCABULARY, NEW_TOKENS = 3, 24, 29, 20


def check_head_kind(kind: str, *, num_offsets: int = 4) -> None:
    """Hold a kind to the laws, on a random model of a few thousand parameters in float64; seconds on a CPU.

    Every parameter belongs to an offset and has a gradient, all backward orders agree, the planner counts right, no
    state depends on later tokens than it may, and drafted text is greedy text.

    Raises:
        TrainingError: Naming the law that is broken, and where.
    """
    model = _noisy_model(_recipe(kind, num_offsets, "joint"))
    checks = (_module_faults, _gradient_faults, _count_faults, _causality_faults, _text_faults)
    for check in checks:
        for broken in check(model, kind):
            raise broken


def _recipe(kind: str, num_offsets: int, backward_order: str) -> Recipe:
    sections = {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2 * num_offsets,
            "num_attention_heads": 2,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.3,
        },
        "heads": {"kind": kind, "num_offsets": num_offsets},
        "objective": {"backward_order": backward_order},
        "data": {"seq_len": SEQ_LEN},
    }
    recipe = Recipe.model_validate(sections)
    for fault in check_rules(recipe):
        raise TrainingError("a head kind must fit a small recipe", f"{fault.path} {fault.expected}", fault.hint)
    return recipe


def _noisy_model(recipe: Recipe) -> MtpModel:
    """Build the model with noise on every parameter, so that nothing is zero or one by construction."""
    model = build_model(recipe).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def _gradients(model: MtpModel, recipe: Recipe) -> dict[str, Tensor]:
    """Gradients of one step on random sequences with document boundaries."""
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_SEQUENCES, SEQ_LEN + model.num_offsets)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    documents = (torch.rand(shape, generator=generator) < 0.1).cumsum(1)
    targets = shifted_targets(tokens, documents, model.num_offsets)
    counts = count_targets(targets).to(torch.float64)
    model.zero_grad()
    objective = Objective(recipe.objective, [1.0] * model.num_offsets, counts)
    accumulate_gradients(model, MicroBatch(tokens, documents, targets), objective, torch.Tensor.backward)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _module_faults(model: MtpModel, kind: str) -> Iterator[TrainingError]:
    modules = [module for offset in model.heads.offsets for module in model.heads.modules_of(offset)]
    listed = {id(parameter) for module in modules for parameter in module.parameters()}
    missing = [name for name, parameter in model.heads.named_parameters() if id(parameter) not in listed]
    if missing:
        yield TrainingError(
            "every parameter of a head kind must belong to an offset",
            f"{', '.join(missing)} of no offset",
            "Let `modules_of` name the module for every offset that uses it.",
        )


def _gradient_faults(model: MtpModel, kind: str) -> Iterator[TrainingError]:
    expected = _gradients(model, _recipe(kind, model.num_offsets, "joint"))
    idle = [name for name, _ in model.named_parameters() if name not in expected or not expected[name].any()]
    if idle:
        yield TrainingError(
            "every parameter must have a gradient",
            f"none or zero of {', '.join(idle)}",
            "Let `forward` use it, or remove it.",
        )
    for backward_order in ("sequential", "bridged"):
        found = _gradients(model, _recipe(kind, model.num_offsets, backward_order))
        wrong = [name for name in expected if name not in found or _error(found[name], expected[name]) > TOLERANCE]
        if wrong:
            yield TrainingError(
                "all backward orders must give the same gradients",
                f"others of {', '.join(wrong)} in the {backward_order} order",
                "Let `forward` compute one offset from the one state that it is given; set `reads_tokens` if it does.",
            )


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def _count_faults(model: MtpModel, kind: str) -> Iterator[TrainingError]:
    planned = parameter_counts(_recipe(kind, model.num_offsets, "joint")).heads
    own = sum(p.numel() for p in model.heads.parameters())
    if planned != own:
        yield TrainingError(
            "the planner must count the parameters of the heads",
            f"{planned:,} planned and {own:,} in the model",
            "Let `num_layers` count the transformer layers of an offset, and `modules_of` name every module.",
        )


@torch.no_grad()
def _causality_faults(model: MtpModel, kind: str) -> Iterator[TrainingError]:
    """Change the tokens of the second half; states that may not see them must stay."""
    tokens = torch.randint(VOCABULARY, (1, SEQ_LEN + model.num_offsets), generator=torch.Generator().manual_seed(3))
    changed, middle = tokens.clone(), SEQ_LEN // 2
    changed[:, middle:] = (changed[:, middle:] + 1) % VOCABULARY
    states, others = (model.hidden_states(own, torch.zeros_like(own)) for own in (tokens, changed))
    for offset in model.heads.offsets:
        end = middle - (offset - 1 if model.heads.reads_tokens else 0)
        if _error(others[offset][:, :end], states[offset][:, :end]) > TOLERANCE:
            yield TrainingError(
                "a state may depend on tokens up to its position only, and on those between it and its target",
                f"offset {offset} of {kind} heads depends on later ones",
                "Let `forward` look at other positions through `context.geometry` only.",
            )


def _text_faults(model: MtpModel, kind: str) -> Iterator[TrainingError]:
    model.eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    greedy, *drafting = applicable_decoders(model)
    expected = generate(model, prompts, decoder=greedy, max_new_tokens=NEW_TOKENS).tokens
    for decoder in drafting:
        tree = build_tree([[0.6, 0.2]] * (model.num_offsets - 1), 6) if decoder == "tree" else None
        found = generate(model, prompts, Settings(decoder=decoder, tree=tree, max_new_tokens=NEW_TOKENS))
        if found.tokens != expected or not found.statistics.num_draft_tokens:
            yield TrainingError(
                "drafted text must be the text of plain greedy decoding",
                f"another one of {kind} heads with decoder {decoder}",
                "Let `forward` compute the same with a KV cache as without: hand `context.geometry` to the layers.",
            )
