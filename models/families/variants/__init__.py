"""Families that are Llama's parts, or those of its mixtures, put together in other ways.

seed_oss.py    Seed-OSS
ernie.py       ERNIE 4.5, dense and with experts
hunyuan.py     Hunyuan, dense and with experts
exaone4.py     EXAONE 4
apertus.py     Apertus
cohere2.py     Command R7B, Command A, Tiny Aya
dots1.py       dots.llm1
solar_open.py  Solar Open
"""
