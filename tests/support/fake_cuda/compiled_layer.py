"""Count the bytes that a compiled transformer layer moves outside of products and attention.

    python -m tests.support.fake_cuda.compiled_layer

torch's compiler is asked on the CPU, in bf16, for the kernels that it has fused, and what each reads and writes; how it
fuses for a GPU may differ. Bytes are per position and channel of the residual stream; feed-forwards are 11/4 of it.
"""

import torch
import torch._inductor.scheduler
from torch._inductor import config

from mtp_lightning.model.layers import Layer
from mtp_lightning.model.positions import window_geometry
from mtp_lightning.recipe.schema.model import ModelSection

WIDTH, POSITIONS = 256, 128


def main() -> None:
    """Print bytes of the forward and of the backward pass."""
    config.force_disable_caches = True
    found: list[tuple[bool, float]] = []
    compile_nodes = torch._inductor.scheduler.Scheduler.codegen

    def codegen(self: torch._inductor.scheduler.Scheduler) -> None:
        for node in self.nodes:
            is_library = any(part.is_extern() for part in node.get_nodes())
            found.append((is_library, node.get_read_write_buffers_sizes() / (POSITIONS * WIDTH)))
        compile_nodes(self)

    torch._inductor.scheduler.Scheduler.codegen = codegen  # type: ignore[method-assign]
    section = ModelSection(hidden_size=WIDTH, num_attention_heads=4, intermediate_size=WIDTH * 11 // 4)
    layer = Layer(section).to(torch.bfloat16)
    hidden = torch.randn(1, POSITIONS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    layer.compile()
    output = layer(hidden, window_geometry(POSITIONS, section, like=hidden))
    forward = sum(size for is_library, size in found if not is_library)
    output.sum().backward()
    both = sum(size for is_library, size in found if not is_library)
    print(f"forward {forward:.1f}, backward {both - forward:.1f} bytes per position and channel")


if __name__ == "__main__":
    main()
