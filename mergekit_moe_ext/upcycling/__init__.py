"""Dense models become the experts of a mixture: the methods, the families of architectures, and the
gates.
"""
