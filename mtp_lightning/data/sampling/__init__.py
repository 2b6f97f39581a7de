"""Which rows a step reads: windows, packing, shuffles, mixtures."""
