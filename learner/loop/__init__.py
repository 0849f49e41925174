"""The training loop: which prompts, which responses of a group are treated, rewards, a step, the driver's state."""
