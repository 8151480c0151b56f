"""Tensor methods, which make one tensor out of its namesakes, and, in `kernels/`, their
arithmetic.
"""
