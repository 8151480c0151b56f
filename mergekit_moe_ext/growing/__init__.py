"""Mixtures of experts that exist: experts are added to them or removed, and all else stays as it
is.
"""
