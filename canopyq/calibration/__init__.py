"""What a layer sees: data, a model run block by block over it, and the statistics of each layer's inputs that stay."""
