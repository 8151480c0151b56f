"""Weight-ensembling models (WEMoE, E-WEMoE): the merge methods, adaptation to inputs, and the way
back to a stock model.
"""
