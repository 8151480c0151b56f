"""One mixture of experts out of several of one family (CAEM-MoE): how experts are allotted, and the
method.
"""
