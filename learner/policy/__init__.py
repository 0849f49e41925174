"""The policy in DeepSpeed: model, ranks as Ray actors, the group that the driver calls, and batches for them."""
