"""Each kernel called with tensors: memory made to fit, the grid chosen.

Tensors are on the kernel's device. Nothing is waited for, and all memory is torch's.
"""
