"""Every merge method of this package, one file each."""

from mergekit_moe_ext.methods.moe import MOE_METHODS

METHODS = (*MOE_METHODS,)
