"""Real processes that start in a tenth of the time: forked from a server that has imported the package, and no more.

Importing JAX and the package takes about two seconds of a processor, a tiny command's own work less than one. The
server has touched no device, so a child begins as any process does: it opens the devices that its own environment asks
for, it can be stopped, killed and waited for, and what it leaves behind is what a process leaves.
"""
