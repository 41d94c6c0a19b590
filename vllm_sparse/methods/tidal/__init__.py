"""TidalDecode: the method, its file of layer roles, and the search that finds them."""

from vllm_sparse.methods.tidal.method import Tidal

__all__ = ["Tidal"]
