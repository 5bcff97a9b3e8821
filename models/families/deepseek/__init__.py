"""DeepSeek's families: latent attention and experts.

v3.py  DeepSeek-V3, Moonlight, Kimi K2, Kimi K2.5
"""
