"""Getting processes onto machines: which rank this one is, and starting the ranks of one machine."""
