"""The project's own C++ kernels for processors: sources, how they are built and loaded, and the rows that use them."""
