"""How good are the samples? Features of images, statistics of features, distances between them."""
