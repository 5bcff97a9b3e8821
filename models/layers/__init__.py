"""Sublayers of a block, and what they share.

sublayer.py          norms and factors around a sublayer, and what all mixers share
mixers.py            the choice of a block's mixer
attention.py         grouped-query attention
latent_attention.py  multi-head latent attention
recurrent/           mixers with a state or a short convolution: the delta rules, Mamba-2, LFM2's
kernels.py           attention kernels: XLA, Pallas, cuDNN
rope.py              rotary position embedding and its scalings
mlp.py               gated MLP, or a mixture of experts
experts.py           expert computation: dense, sorted, or over a mesh
context.py           inputs that all blocks share: positions, masks, rotation tables
norm.py              RMS norm, soft cap, random initial parameters
"""
