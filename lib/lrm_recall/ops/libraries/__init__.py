"""Adapters from our ops to the kernels of libraries, one module a library; found by lrm_recall.ops.dispatch.

An adapter has the name and the arguments of its op. It raises Unsupported, before it does anything, for what its
kernel cannot take. For one token without gradients it may change the state that it is given in place: the caller has
no use for the old one.
"""

from lrm_kernels import autotune

autotune.apply()  # before the first kernel of a library is defined
