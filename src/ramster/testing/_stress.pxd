# Nothing for other extensions: _stress.pyi lists what Python may call.
