"""The page path: arena, segments, codec, page tables, links, pending gets and fault serving.

Native code (the underscore modules, Cython without the GIL) sits beside the Python module that documents it.
Python never touches page bytes here: it starts things, asks for statistics and passes decisions on.
"""
