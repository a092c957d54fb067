"""What dynamic sparsity does to a model: perplexity of text and needles found, against the work that is skipped."""
