"""PPO against a KL-penalised reward: rollout -> credit -> gradients, in the order of `trainer.PPOTrainer.step`."""
