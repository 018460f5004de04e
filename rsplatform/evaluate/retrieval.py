"""Recall at k under the name that evaluations use; training reports the same, so it lives in model/recall.py."""

from rsplatform.model.recall import chance_recall, recall_at_k

__all__ = ["chance_recall", "recall_at_k"]
