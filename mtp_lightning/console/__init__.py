"""What is printed: tables, progress, errors, plots."""
