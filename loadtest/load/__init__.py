"""Load test of an OpenAI-compatible server: scenarios, workloads, the client, the run with its journal, the report."""
