"""Upcycling of dense models, which become the experts of a mixture: the merge methods, the families
of architectures, and the gates.
"""
