"""State and batches on a mesh of devices.

sharding.py         sharding of a step's state and batches
placement.py        transfers between a process's memory and devices
host_parameters.py  parameters on the hosts of a mesh
"""
