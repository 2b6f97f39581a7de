"""Memory and time of training steps."""
