"""Sublayers of a block, and what they share.

sublayer.py          norms and factors around a sublayer
attention.py         grouped-query attention
latent_attention.py  multi-head latent attention
kernels.py           attention kernels: XLA, Pallas, cuDNN
rope.py              rotary position embedding and its scalings
mlp.py               gated MLP, or a mixture of experts
experts.py           expert computation: dense, sorted, or over a mesh
context.py           inputs that all blocks share: positions, masks, rotation tables
norm.py              RMS norm, soft cap, random initial parameters
"""
