"""Token ids that other libraries wrote, read where they lie."""
