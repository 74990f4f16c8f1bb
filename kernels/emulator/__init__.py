"""CUDA kernels on the host: how their sources are built with a C++ compiler into a stand-in for NVIDIA's driver."""
