"""Images: data sets, splits, batches, augmentation."""
