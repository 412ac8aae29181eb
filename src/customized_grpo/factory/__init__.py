"""From a configuration to parts: policy, rewards and data."""
