"""What a model costs: milliseconds and memory of prefill, decoding and training, on this machine."""
