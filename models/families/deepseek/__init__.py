"""DeepSeek's families: latent attention and experts.

v2.py           DeepSeek-V2
v3.py           DeepSeek-V3, Moonlight, Kimi K2, Kimi K2.5
v32.py          DeepSeek-V3.2: an indexer
kimi_linear.py  Kimi Linear: Kimi delta attention in three blocks of four
"""
