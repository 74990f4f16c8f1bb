"""CUDA kernels of our own: sources in C++, and what the host does to run them."""
