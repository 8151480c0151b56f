"""Mixtures of whole decoders, routed per sequence (MergeME): the methods, and their requirements of
decoders.
"""
