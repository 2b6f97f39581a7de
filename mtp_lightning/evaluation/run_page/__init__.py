"""Runs on one HTML page that needs no network: curves drawn by Observable Plot, which lies beside these files."""
