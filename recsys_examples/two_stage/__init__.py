"""Two-stage recommendation: retrieval, a multi-task ranker, score fusion, diversity."""
