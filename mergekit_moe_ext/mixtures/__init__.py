"""Mixtures of experts that exist already: where their routers and experts lie, how they are used
and trained.
"""
