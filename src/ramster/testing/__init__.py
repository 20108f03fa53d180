"""Shipped tools for tests and benchmarks: native stress threads, the floors that figures stand beside.

May import everything; nothing of the product imports it.
"""
