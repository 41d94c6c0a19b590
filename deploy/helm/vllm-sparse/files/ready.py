"""Readiness probe: `/v1/models` lists the models. Usage: ready.py URL NAME..."""

import json
import os
import sys
import urllib.request

url, *names = sys.argv[1:]
key = os.environ.get("VLLM_API_KEY")
request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
with urllib.request.urlopen(request, timeout=4) as reply:
    listed = [model["id"] for model in json.load(reply)["data"]]
missing = [name for name in names if name not in listed]
if missing:
    sys.exit(f"{url}/v1/models lists {', '.join(listed)}, not {', '.join(missing)}")
