"""GLM's families.

dense.py   GLM-4
moe.py     GLM-4.5: experts
latent.py  GLM-4.7-Flash, GLM-5: experts and latent attention
"""
