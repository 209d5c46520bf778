"""Messages between processes, encoded with msgpack: commands to the ranks, the HTTP tunnel, the update lock."""
