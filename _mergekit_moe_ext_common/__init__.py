"""What both packages need, which do not import each other: data, options, outputs, training.
Private.
"""
