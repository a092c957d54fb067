"""What dynamic sparsity and quantised weights do to a model: perplexity and needles found, against what is saved."""
