"""Families whose blocks have Mamba-2.

sizes.py     its sizes and tensors, as they share them
granite.py   Granite 4
nemotron.py  Nemotron-H, Nemotron 3
falcon.py    Falcon-H1
bamba.py     Bamba
"""
