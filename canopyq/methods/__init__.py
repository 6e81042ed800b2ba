"""Better than rounding each weight alone: one method a file, each a pure function on a weight and what is known of its
inputs, and `pipeline`, which runs them over a model."""
