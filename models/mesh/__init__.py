"""Meshes of devices.

sharding.py   sharding rules by kind of parameter
ambient.py    axes of the mesh that surrounds a traced computation
recording.py  a teacher on a mesh, and how recorded rows are distributed
"""
