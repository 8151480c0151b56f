"""Mixtures of whole decoders, routed per sequence (MergeME): the methods, and what they ask of
decoders.
"""
