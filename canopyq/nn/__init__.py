"""One layer: modules that hold packed weights, in the place of torch's linear, embedding and expert layers."""
