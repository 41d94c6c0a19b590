"""Load on a server: scenarios, arrivals, the client, the run and its journal."""
