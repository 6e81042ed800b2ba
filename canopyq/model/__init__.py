"""A whole model, quantized in place, and the report of it."""
