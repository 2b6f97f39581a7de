"""Token shards on disk and behind URLs: build, index, verify, cache."""
