"""PPO against a KL-penalised reward: `functional` (the maths), `rollout`, `trainer`, and the `types` they exchange."""
