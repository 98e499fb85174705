"""Layouts of weights that are packed in the files of a checkpoint.

In reading order:

bitsandbytes_layout   packed weights under the names that bitsandbytes gives them; their bytes are kept
mapped_weights        tensors and packed weights as views of a mapped file
mxfp4_layout          stacks of experts in MXFP4, unpacked while they are read
"""
