"""Every place where classes of vLLM are wrapped or derived from to hook in, one file a class.

Each `install` is idempotent: vLLM loads plugins several times in a process.
"""
