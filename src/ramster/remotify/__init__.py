"""Which segments leave, to whom and how fast: decisions without I/O (policy), and the shell that carries them out
(worker).
"""
