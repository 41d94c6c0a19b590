"""The server's configuration and requests' settings: validation, defaults, resolution, cache salt."""
