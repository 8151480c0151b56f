"""Existing mixtures of experts: the place of their routers and experts, their usage, and their
training.
"""
