"""Benchmarks: dense, sparse and peers interleaved in one process, correctness first, losses shown."""
