"""From a dataset on disk to batches on the device."""
