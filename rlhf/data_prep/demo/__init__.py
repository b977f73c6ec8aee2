"""The demo's data: rated movie-review sentences as demonstrations, rankings and prompts. Its splits are its own, and fixed."""
