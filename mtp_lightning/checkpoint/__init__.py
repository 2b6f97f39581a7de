"""Checkpoints that survive a kill at any moment: folders of safetensors and JSON, committed by one rename.

Weights and moments are shards (`shards` writes what a rank owns, `shard_reader` reads any interval, whoever wrote
it), so a run goes on with another number of ranks or another strategy. All other state is a JSON document and the
tensors that it names (`tree`); `tensors` is the safetensors format itself. `commit` makes a checkpoint out of what all
ranks wrote, and deletes old ones; `manifest` describes a complete one, or an exported folder. `folder` finds and
verifies them, once: `open_checkpoint` gives a `CheckpointFolder`, which is passed on in place of its path. `loading`
gives back a model, `consolidate` exports one, `extending` gives one more heads.
`importing` makes such a folder of a pretrained model of others, `exporting_hf` gives one back; `hf` knows theirs.
Nothing is ever pickled, so reading runs no code of its author.
"""
