"""Convolution, ReLU and pooling, fast on CPUs, GPUs and TPUs."""
