"""Mixers with a state or a short convolution in the place of attention.

convolution.py       short causal convolution within documents
short_conv.py        gated short convolution
gated_delta.py       gated delta rule behind a short convolution
delta_rule.py        the rule itself, a chunk of tokens at a time
mamba.py             Mamba-2, alone or beside attention
ssd.py               its recurrence, a chunk of tokens at a time
"""
