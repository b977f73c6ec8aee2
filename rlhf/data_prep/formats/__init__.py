"""Shapes of data: files, rows, and one reader for each published format."""
