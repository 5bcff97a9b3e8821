"""Qwen's families.

dense.py   Qwen2, Qwen3
moe.py     Qwen2-MoE, Qwen3-MoE
vision.py  Qwen3-VL, its text model
hybrid.py  Qwen3-Next, Qwen3.5: gated delta rule and gated attention
"""
