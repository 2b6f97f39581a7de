"""When and how a run is saved, and what it starts from."""
