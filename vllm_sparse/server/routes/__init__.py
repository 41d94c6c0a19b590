"""HTTP routes below ``/v1/sparse``: one file a group, each with its `router`."""
