"""Starting runs: the launchers that set ranks, settings for DeepSpeed, preflight, predictions."""
