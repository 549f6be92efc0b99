"""The operations of the nets, fast on CPUs, GPUs and TPUs."""
