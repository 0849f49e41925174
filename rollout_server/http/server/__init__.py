"""The server process around the routes: settings, sockets, middleware, admission, logs, metrics, start and end."""
