"""Sublayers of a block, and what they share.

sublayer.py          norms and factors around a sublayer, and what all mixers share
mixers.py            the choice of a block's mixer
attention.py         grouped-query attention
latent_attention.py  multi-head latent attention
gated_delta.py       gated delta rule behind a short convolution
delta_rule.py        the rule itself, a chunk of tokens at a time
short_conv.py        gated short convolution
mamba.py             Mamba-2, alone or beside attention
ssd.py               its recurrence, a chunk of tokens at a time
convolution.py       short causal convolution within documents
kernels.py           attention kernels: XLA, Pallas, cuDNN
rope.py              rotary position embedding and its scalings
mlp.py               gated MLP, or a mixture of experts
experts.py           expert computation: dense, sorted, or over a mesh
context.py           inputs that all blocks share: positions, masks, rotation tables
norm.py              RMS norm, soft cap, random initial parameters
"""
