"""Published training runs of MPT models, as planner input.

[llm-foundry, scripts/train/benchmarking/README.md, commit 061f2c7]: PyTorch FSDP FULL_SHARD (as ZeRO-3), bf16. MPT has
an MLP of four widths without a gate, a vocabulary of 50,368, learned positions and a tied embedding; its fused
cross-entropy keeps the logits in bf16 and their gradient in the same place. FSDP gathers two layers ahead of their use
and reduces layer by layer, without DeepSpeed's buckets.
"""

from dataclasses import dataclass

from mtp_lightning.planner.counts import ParameterCounts
from mtp_lightning.planner.layout import BF16, Layout
from mtp_lightning.planner.passes import BackwardFlow, MatmulCost, Part
from mtp_lightning.planner.shape import Layer, Shape

VOCABULARY = 50_368
WIDTHS_AND_LAYERS = {
    "125M": (768, 12),
    "350M": (1024, 24),
    "760M": (1536, 24),
    "1B": (2048, 24),
    "3B": (2560, 32),
    "7B": (4096, 32),
    "13B": (5120, 40),
    "30B": (7168, 48),
    "70B": (8192, 80),
}


@dataclass(frozen=True)
class Run:
    """A row of the table."""

    model: str
    num_parameters: int
    gpu: str
    num_gpus: int
    seq_len: int
    micro_batch_size: int
    num_micro_batches: int
    recomputes: bool
    tokens_per_s: float  # per GPU

    @property
    def shape(self) -> Shape:
        """The model."""
        width, num_layers = WIDTHS_AND_LAYERS[self.model]
        return mpt(width, num_layers, self.seq_len, self.num_parameters)

    @property
    def layout(self) -> Layout:
        """The step."""
        return Layout(
            num_gpus=self.num_gpus,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
            recomputes_trunk=self.recomputes,
            bucket_entries=0,
            live_entries=0,
            reduce_bytes=BF16,
            gradient_bytes=BF16,
            chunk_bytes=4 * self.micro_batch_size * self.seq_len * VOCABULARY,
        )


def trained(entries: int, num_layers: int = 0) -> MatmulCost:
    """Everything that matrices and layers cost where all of them are trained."""
    return MatmulCost(forward=entries, inputs=entries, weights=entries, layers=num_layers, layers_back=num_layers)


def mpt(width: int, num_layers: int, seq_len: int, num_parameters: int) -> Shape:
    """Describe an MPT model."""
    return Shape(
        parameters=ParameterCounts(trunk=num_parameters, heads=0, unembedding=0),
        num_trainable=num_parameters,
        passes=BackwardFlow(
            trunk=Part(work=trained(12 * width * width * num_layers, num_layers)),
            heads=Part(work=MatmulCost()),
            unembedding=trained(VOCABULARY * width),
            num_losses=1,
            num_scored=VOCABULARY,
            most_scored=VOCABULARY,
            num_matrix_gradients=1,
        ),
        layer=Layer(
            width=width,
            matrices=12 * width * width,
            query_width=width,
            key_width=width,
            intermediate_size=4 * width,
            is_gated=False,
        ),
        num_trunk_layers=num_layers,
        vocab_size=VOCABULARY,
        seq_len=seq_len,
    )


RUNS = (  # the constants in hardware.yaml are fitted to these
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

OTHER_RUNS = (  # from the same page: no constant is fitted to them, but they were in view when the model took its form
    Run("70B", 64_862_437_376, "H100", 64, 2048, 8, 4, True, 1039),
    Run("30B", 30_019_254_272, "H100", 8, 8192, 1, 21, True, 1384),
    Run("30B", 29_989_894_144, "H100", 8, 4096, 1, 21, True, 1802),
    Run("30B", 29_975_214_080, "H100", 16, 2048, 10, 3, True, 2263),
    Run("13B", 13_011_240_960, "H100", 8, 32768, 1, 3, True, 1976),
    Run("13B", 12_848_711_680, "H100", 8, 1024, 40, 3, True, 5502),
    Run("7B", 6_918_905_856, "H100", 8, 65536, 1, 2, True, 1956),
    Run("7B", 6_667_247_616, "H100", 8, 4096, 16, 2, True, 8611),
    Run("7B", 6_658_859_008, "H100", 8, 2048, 6, 1, False, 10643),
    Run("3B", 2_688_537_600, "H100", 8, 16384, 1, 6, False, 11152),
    Run("1B", 1_320_144_896, "H100", 8, 4096, 7, 4, False, 38535),
    Run("1B", 1_315_950_592, "H100", 64, 2048, 20, 1, False, 44402),
    Run("760M", 760_470_528, "H100", 32, 2048, 24, 1, False, 67971),
    Run("70B", 64_862_437_376, "A100-80", 64, 2048, 8, 4, True, 410),
    Run("30B", 29_975_214_080, "A100-80", 8, 2048, 3, 21, True, 916),
    Run("13B", 12_927_354_880, "A100-80", 8, 16384, 3, 3, True, 1431),
    Run("7B", 6_667_247_616, "A100-80", 8, 4096, 16, 2, True, 3684),
    Run("7B", 6_658_859_008, "A100-80", 8, 2048, 6, 2, False, 4641),
    Run("3B", 2_647_905_280, "A100-80", 8, 512, 40, 6, False, 12127),
    Run("1B", 1_345_310_720, "A100-80", 8, 16384, 2, 4, False, 9956),
    Run("1B", 1_315_950_592, "A100-80", 8, 2048, 14, 4, False, 20513),
    Run("350M", 355_985_408, "A100-80", 8, 2048, 32, 2, False, 58782),
    Run("125M", 125_311_488, "A100-80", 8, 2048, 40, 2, False, 142830),
    Run("70B", 64_862_437_376, "A100-40", 128, 2048, 4, 1, True, 376),
    Run("70B", 64_862_437_376, "A100-40", 64, 2048, 2, 1, True, 276),
    Run("30B", 29_975_214_080, "A100-40", 32, 2048, 4, 1, True, 857),
    Run("13B", 12_853_954_560, "A100-40", 16, 2048, 10, 1, True, 1993),
    Run("7B", 6_658_859_008, "A100-40", 128, 2048, 18, 1, True, 3623),
    Run("3B", 2_657_080_320, "A100-40", 8, 4096, 2, 8, False, 8777),
    Run("1B", 1_315_950_592, "A100-40", 128, 2048, 10, 1, False, 18647),
    Run("350M", 355_985_408, "A100-40", 128, 2048, 18, 1, False, 51934),
)
