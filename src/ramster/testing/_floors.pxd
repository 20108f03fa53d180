# Nothing for other extensions: _floors.pyi lists what Python may call.
