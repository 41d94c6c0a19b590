"""SALE: the method, its file of thresholds, and the search that calibrates them."""

from vllm_sparse.methods.sale.method import Sale

__all__ = ["Sale"]
