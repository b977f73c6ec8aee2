"""From sources to a checked data folder: clean, merge raters, deduplicate, split, write."""
