"""A port for a server that a test starts."""

import socket


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port
