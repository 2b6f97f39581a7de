"""Speed-up of decoding with drafts."""
