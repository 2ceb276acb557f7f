"""Reading a dataset for training and evaluation: order, dataset, ring, loader, remote shards and their cache."""
