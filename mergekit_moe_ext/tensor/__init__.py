"""Tensor methods, which make one tensor out of its namesakes, and their arithmetic in
`kernels/`."""
