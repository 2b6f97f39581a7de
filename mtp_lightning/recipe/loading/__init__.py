"""From YAML files and overrides to a validated recipe."""
