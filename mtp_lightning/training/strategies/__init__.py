"""How a model lives on devices while it is trained: one of them, or DeepSpeed ZeRO over many."""
