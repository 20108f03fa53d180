"""`ramster demo`: two real nodes on this machine, an array larger than its RAM, every page compared.

plan (what), source (which bytes), digest (what is right), workload + worker (the work, in its own process),
nodes (the cluster), run (the order of things), report and live (what people see).
"""
