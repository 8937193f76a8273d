"""What runs and benchmarks found, beside what the authors published."""
