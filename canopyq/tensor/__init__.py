"""One tensor: number formats, which values share a scale, ranges, codes, and codes packed into words."""
