"""What a policy is worth: scores, KL, length, variety and an independent judge on held-out prompts."""
