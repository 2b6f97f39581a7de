"""What survives a kill: durable writes, folders that appear whole, and locks that end with their holder."""
