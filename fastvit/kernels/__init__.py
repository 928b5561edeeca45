"""Kernels, tensor in and tensor out: no autograd, no policy."""
