"""The review: data and options against what they should be, before anything is trained."""
