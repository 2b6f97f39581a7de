"""What happens around the training step: checkpoints, metrics files, the live view, the summary.

Every callback takes the recipe and finds what it shows in the module's `metrics`, a plain dict by column name that
is non-empty right after a logged step and right after a validation. Their order matters and is fixed in one place,
`build.build_callbacks`.
"""
