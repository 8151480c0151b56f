"""Weight-ensembling models (WEMoE, E-WEMoE): the methods, adaptation to inputs, and back to a stock
model.
"""
