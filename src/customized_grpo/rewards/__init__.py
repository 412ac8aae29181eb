"""The rewards: the protocol `Reward`, pretrained encoders, judges, remote servers and user functions."""
