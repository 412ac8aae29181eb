"""`customized-grpo evaluate --benchmark`: a picture for every prompt of a benchmark, measured and held against what is
published."""
