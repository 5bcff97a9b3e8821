"""GLM's families.

moe.py    GLM-4.5: experts
"""
