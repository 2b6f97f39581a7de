"""Published training runs of MPT models, as planner input.

[llm-foundry, scripts/train/benchmarking/README.md, commit 061f2c7]: PyTorch FSDP FULL_SHARD (as ZeRO-3), bf16. MPT has
an MLP of four widths without a gate, a vocabulary of 50,368, learned positions and a tied embedding; its fused
cross-entropy keeps the logits in bf16 and their gradient in the same place.
"""

from dataclasses import dataclass

from mtp_lightning.planner.counts import ParameterCounts
from mtp_lightning.planner.layout import Layout
from mtp_lightning.planner.shape import Layer, Shape

VOCABULARY = 50_368
WIDTHS_AND_LAYERS = {"3B": (2560, 32), "13B": (5120, 40)}


@dataclass(frozen=True)
class Run:
    """A row of the table."""

    model: str
    num_parameters: int
    gpu: str
    num_gpus: int
    window_tokens: int
    micro_rows: int
    num_micro_batches: int
    recomputes: bool
    tokens_per_s: float  # per GPU
    width_and_layers: tuple[int, int] | None = None

    @property
    def shape(self) -> Shape:
        """The model."""
        width, num_layers = self.width_and_layers or WIDTHS_AND_LAYERS[self.model]
        return mpt(width, num_layers, self.window_tokens, self.num_parameters)

    @property
    def layout(self) -> Layout:
        """The step."""
        return Layout(
            num_gpus=self.num_gpus,
            micro_rows=self.micro_rows,
            num_micro_batches=self.num_micro_batches,
            recomputes_trunk=self.recomputes,
            chunk_bytes=4 * self.micro_rows * self.window_tokens * VOCABULARY,
        )


def mpt(width: int, num_layers: int, window_tokens: int, num_parameters: int) -> Shape:
    """Describe an MPT model."""
    return Shape(
        parameters=ParameterCounts(trunk=num_parameters, heads=0, unembedding=0),
        layer=Layer(
            width=width,
            matrices=12 * width * width,
            query_width=width,
            key_width=width,
            mlp_width=4 * width,
            is_gated=False,
        ),
        num_trunk_layers=num_layers,
        vocabulary=VOCABULARY,
        window_tokens=window_tokens,
    )


RUNS = (
    Run("13B", 12_864_440_320, "H100", 8, 4096, 10, 3, True, 4717),
    Run("13B", 12_853_954_560, "H100", 8, 2048, 2, 1, False, 4792),
    Run("13B", 12_853_954_560, "H100", 16, 2048, 2, 1, False, 4767),
    Run("13B", 12_853_954_560, "H100", 64, 2048, 2, 1, False, 4800),
    Run("13B", 12_927_354_880, "H100", 8, 16384, 3, 3, True, 2985),
    Run("3B", 2_657_080_320, "H100", 8, 4096, 5, 6, False, 20_964),
    Run("3B", 2_651_837_440, "H100", 64, 2048, 6, 3, False, 22_525),
    Run("13B", 12_864_440_320, "A100-80", 8, 4096, 10, 3, True, 2060),
    Run("13B", 12_853_954_560, "A100-80", 8, 2048, 2, 3, False, 2262),
    Run("3B", 2_657_080_320, "A100-80", 8, 4096, 5, 6, False, 9457),
    Run("3B", 2_651_837_440, "A100-80", 8, 2048, 10, 2, False, 10_811),
    Run("13B", 12_853_954_560, "A100-40", 128, 2048, 16, 1, True, 1972),
    Run("13B", 12_853_954_560, "A100-40", 8, 2048, 4, 16, True, 1668),
)
